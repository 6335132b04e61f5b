"""Every refusal of EC2's that there is here, its code and its text, in one table.

The codes are EC2's (EC2 API Reference, "Error codes for the Amazon EC2 API"). The texts are EC2's
as it prints them where they are known (they end as EC2 ends them); those that say more than EC2
would, or for which no wording of EC2 is known to us, are ours.
"""

from __future__ import annotations

import enum

from sandbox.errors import Ec2Error

_SHOWN = 100
"""What is shown of somebody's text: ids, names and blocks are shorter."""


class Refusal(enum.Enum):
    code: str
    text: str

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        self.text = text

    def error(self, **values: object) -> Ec2Error:
        """With the values in the text, printable and short: they may be anybody's bytes."""
        shown = {name: _shown(str(value)) for name, value in values.items()}
        return Ec2Error(self.code, self.text.format(**shown))

    # Not there
    VPC_NOT_FOUND = "InvalidVpcID.NotFound", "The vpc ID '{id}' does not exist"
    SUBNET_NOT_FOUND = "InvalidSubnetID.NotFound", "The subnet ID '{id}' does not exist"
    GROUP_NOT_FOUND = "InvalidGroup.NotFound", "The security group '{id}' does not exist"
    GROUP_ELSEWHERE = (
        "InvalidGroup.NotFound",
        "You have specified two resources that belong to different networks.",
    )
    RULE_ID_NOT_FOUND = (
        "InvalidSecurityGroupRuleId.NotFound",
        "The security group rule ID '{id}' does not exist",
    )
    RULE_NOT_FOUND = (
        "InvalidPermission.NotFound",
        "The specified rule does not exist in this security group.",
    )
    ROUTE_TABLE_NOT_FOUND = (
        "InvalidRouteTableID.NotFound",
        "The routeTable ID '{id}' does not exist",
    )
    ROUTE_NOT_FOUND = (
        "InvalidRoute.NotFound",
        "no route with destination-cidr-block {destination} in route table {table}",
    )
    INTERNET_GATEWAY_NOT_FOUND = (
        "InvalidInternetGatewayID.NotFound",
        "The internetGateway ID '{id}' does not exist",
    )
    GATEWAY_NOT_FOUND = "InvalidGatewayID.NotFound", "The gateway ID '{id}' does not exist"
    NAT_GATEWAY_NOT_FOUND = "NatGatewayNotFound", "The Nat Gateway {id} was not found"
    ALLOCATION_NOT_FOUND = (
        "InvalidAllocationID.NotFound",
        "The allocation ID '{id}' does not exist",
    )
    ASSOCIATION_NOT_FOUND = (
        "InvalidAssociationID.NotFound",
        "The association ID '{id}' does not exist",
    )
    ACL_NOT_FOUND = "InvalidNetworkAclID.NotFound", "The networkAcl ID '{id}' does not exist"
    ACL_ENTRY_NOT_FOUND = (
        "InvalidNetworkAclEntry.NotFound",
        "The network acl entry identified by {number} does not exist.",
    )
    PREFIX_LIST_NOT_FOUND = (
        "InvalidPrefixListID.NotFound",
        "The prefix list ID '{id}' does not exist",
    )
    DHCP_OPTIONS_NOT_FOUND = (
        "InvalidDhcpOptionID.NotFound",
        "The dhcpOption ID '{id}' does not exist",
    )
    INTERFACE_NOT_FOUND = (
        "InvalidNetworkInterfaceID.NotFound",
        "The networkInterface ID '{id}' does not exist",
    )

    # There already
    GROUP_DUPLICATE = (
        "InvalidGroup.Duplicate",
        "The security group '{name}' already exists for VPC '{vpc}'",
    )
    RULE_DUPLICATE = "InvalidPermission.Duplicate", 'the specified rule "{rule}" already exists'
    RULE_TWICE = (
        "InvalidParameterValue",
        "The same permission must not appear multiple times",
    )
    ROUTE_EXISTS = (
        "RouteAlreadyExists",
        "The route identified by {destination} already exists.",
    )
    ACL_ENTRY_EXISTS = (
        "NetworkAclEntryAlreadyExists",
        "The network acl entry identified by {number} already exists.",
    )
    SUBNET_CONFLICT = "InvalidSubnet.Conflict", "The CIDR '{cidr}' conflicts with another subnet"
    GATEWAY_ATTACHED = (
        "Resource.AlreadyAssociated",
        "resource {id} is already attached to network {vpc}",
    )
    VPC_HAS_GATEWAY = (
        "Resource.AlreadyAssociated",
        "Network {vpc} already has an internet gateway attached",
    )
    TABLE_ASSOCIATED = (
        "Resource.AlreadyAssociated",
        "the specified association for route table {table} conflicts with an existing association",
    )
    ADDRESS_ASSOCIATED = (
        "Resource.AlreadyAssociated",
        "resource {id} is already associated with associate-id {association}",
    )
    DEFAULT_VPC_EXISTS = (
        "DefaultVpcAlreadyExists",
        "A Default VPC already exists for this account in this region.",
    )

    # In use
    VPC_IN_USE = (
        "DependencyViolation",
        "The vpc '{id}' has dependencies and cannot be deleted.",
    )
    SUBNET_IN_USE = (
        "DependencyViolation",
        "The subnet '{id}' has dependencies and cannot be deleted.",
    )
    GROUP_IN_USE = "DependencyViolation", "resource {id} has a dependent object"
    ROUTE_TABLE_IN_USE = (
        "DependencyViolation",
        "The routeTable '{id}' has dependencies and cannot be deleted.",
    )
    ACL_IN_USE = (
        "DependencyViolation",
        "The networkAcl '{id}' has dependencies and cannot be deleted.",
    )
    GATEWAY_IN_USE = (
        "DependencyViolation",
        "The internetGateway '{id}' has dependencies and cannot be deleted.",
    )
    ADDRESSES_MAPPED = (
        "DependencyViolation",
        "Network {vpc} has some mapped public address(es). Please unmap those public address(es) "
        "before detaching the gateway.",
    )
    DHCP_OPTIONS_IN_USE = (
        "DependencyViolation",
        "The dhcpOptions '{id}' has dependencies and cannot be deleted.",
    )
    PREFIX_LIST_IN_USE = (
        "DependencyViolation",
        "The prefix list '{id}' is named by security groups and cannot be deleted.",
    )
    ADDRESS_IN_USE = "InvalidIPAddress.InUse", "Address {address} is in use."
    DEFAULT_GROUP_STAYS = (
        "CannotDelete",
        'the specified group: "{id}" name: "default" cannot be deleted by a user',
    )
    DEFAULT_ACL_STAYS = "CannotDelete", "cannot delete default network ACL {id}"
    MAIN_TABLE_STAYS = (
        "InvalidParameterValue",
        "cannot disassociate the main route table association {association}",
    )
    LOCAL_ROUTE_STAYS = (
        "InvalidParameterValue",
        "cannot remove local route {destination} in route table {table}",
    )
    NOT_YOURS = (
        "OperationNotPermitted",
        "The network interface {id} is managed by a service and cannot be changed.",
    )

    # Not so
    VPC_RANGE = "InvalidVpc.Range", "The CIDR '{cidr}' is invalid."
    VPC_IN_PUBLIC_POOL = (
        "InvalidVpc.Range",
        "The CIDR '{cidr}' is invalid: it overlaps public_pool {pool}",
    )
    SUBNET_RANGE = "InvalidSubnet.Range", "The CIDR '{cidr}' is invalid."
    NOT_A_CIDR = (
        "InvalidParameterValue",
        "Value ({value}) for parameter {parameter} is invalid. This is not a valid CIDR block.",
    )
    NOT_AN_ADDRESS = "InvalidParameterValue", "invalid value for parameter address: {value}"
    ADDRESS_OUTSIDE = (
        "InvalidParameterValue",
        "Address {address} does not fall within the subnet's address range",
    )
    ADDRESS_RESERVED = (
        "InvalidParameterValue",
        "Address {address} is in subnet's reserved address range",
    )
    ZONE = (
        "InvalidParameterValue",
        "Value ({zone}) for parameter availabilityZone is invalid. Subnets can currently only be "
        "created in the following availability zones: {zones}.",
    )
    VALUE = "InvalidParameterValue", "Value ({value}) for parameter {parameter} is invalid. {why}"
    COMBINATION = "InvalidParameterCombination", "{why}"
    MISSING = (
        "MissingParameter",
        "The request must contain the parameter {parameter}",
    )
    PROTOCOL = (
        "InvalidParameterValue",
        "Invalid value '{protocol}' for IP protocol. Unknown protocol.",
    )
    PORTS_MISSING = (
        "InvalidParameterValue",
        "Invalid value for portRange. Must specify both from and to ports with TCP/UDP.",
    )
    PORT_RANGE = "InvalidParameterValue", "Invalid TCP/UDP port range ({first}:{last})"
    ICMP = "InvalidParameterValue", "ICMP type ({type}) and code ({code}) are -1 to 255"
    ONE_PEER = (
        "InvalidPermission.Malformed",
        "A rule has exactly one of an IPv4 block, an IPv6 block, a prefix list and a group.",
    )
    NO_RULES = "MissingParameter", "Either 'ipPermissions' or 'securityGroupRuleIds' is required"
    RULE_DESCRIPTION = (
        "InvalidParameterValue",
        "Invalid rule description. Valid descriptions are strings less than 256 characters from "
        "the following set:  a-zA-Z0-9. _-:/()#,@[]+=&;{{}}!$*",
    )
    GROUP_NAME = (
        "InvalidParameterValue",
        "Value ({name}) for parameter GroupName is invalid. Character sets beyond a-zA-Z0-9. "
        "_-:/()#,@[]+=&;{{}}!$* are not allowed, nor are names over 255 bytes.",
    )
    GROUP_NAME_RESERVED = (
        "InvalidParameterValue",
        "Invalid group-name. Group names may not be in the format sg-*.",
    )
    GROUP_NAME_DEFAULT = (
        "InvalidParameterValue",
        "Cannot use reserved security group name: default",
    )
    GROUP_DESCRIPTION = (
        "InvalidParameterValue",
        "Value ({description}) for parameter GroupDescription is invalid. Character sets beyond "
        "a-zA-Z0-9. _-:/()#,@[]+=&;{{}}!$* are not allowed, nor are descriptions over 255 bytes.",
    )
    GROUP_ON_OTHER_SUBNET = (
        "InvalidParameter",
        "Security group {group} and subnet {subnet} belong to different networks.",
    )
    ROUTE_TARGET = (
        "InvalidParameterValue",
        "Route target is not supported. This route only supports interface and instance targets.",
    )
    ROUTE_ELSEWHERE = (
        "InvalidParameterValue",
        "route table {table} and network gateway {gateway} belong to different networks",
    )
    TABLE_ELSEWHERE = (
        "InvalidParameterValue",
        "route table {table} and {other} belong to different networks",
    )
    ACL_ELSEWHERE = (
        "InvalidParameterValue",
        "Network ACL {acl} and subnet {subnet} belong to different networks",
    )
    ACL_NUMBER = (
        "InvalidParameterValue",
        "Value ({number}) for parameter ruleNumber is invalid. It is not 1 to 32766.",
    )
    GATEWAY_NOT_ATTACHED = (
        "Gateway.NotAttached",
        "resource {id} is not attached to network {vpc}",
    )
    NO_GATEWAY = (
        "Gateway.NotAttached",
        "Network {vpc} is not attached to any internet gateway",
    )
    NO_GATEWAY_FOR_NAT = (
        "Gateway.NotAttached",
        "Network {vpc} has no Internet gateway attached",
    )
    VERSION_MISMATCH = (
        "IncorrectState",
        "The prefix list '{id}' is at version {version}, not {expected}.",
    )

    # Too many
    VPC_LIMIT = "VpcLimitExceeded", "The maximum number of VPCs has been reached."
    SUBNET_LIMIT = "SubnetLimitExceeded", "The maximum number of subnets has been reached."
    GROUP_LIMIT = (
        "SecurityGroupLimitExceeded",
        "The maximum number of security groups has been reached.",
    )
    RULE_LIMIT = (
        "RulesPerSecurityGroupLimitExceeded",
        "The maximum number of rules per security group has been reached.",
    )
    GROUPS_ON_INTERFACE = (
        "SecurityGroupsPerInterfaceLimitExceeded",
        "The maximum number of security groups per interface has been reached.",
    )
    ROUTE_TABLE_LIMIT = (
        "RouteTableLimitExceeded",
        "The maximum number of route tables has been reached.",
    )
    ROUTE_LIMIT = "RouteLimitExceeded", "The maximum number of routes has been reached."
    GATEWAY_LIMIT = (
        "InternetGatewayLimitExceeded",
        "The maximum number of internet gateways has been reached.",
    )
    NAT_GATEWAY_LIMIT = (
        "NatGatewayLimitExceeded",
        "The maximum number of NAT Gateways has been reached.",
    )
    ACL_LIMIT = "NetworkAclLimitExceeded", "The maximum number of network ACLs has been reached."
    ACL_ENTRY_LIMIT = (
        "NetworkAclEntryLimitExceeded",
        "The maximum number of network ACL entries has been reached.",
    )
    ADDRESS_LIMIT = "AddressLimitExceeded", "The maximum number of addresses has been reached."
    PREFIX_LIST_LIMIT = (
        "PrefixListLimitExceeded",
        "The maximum number of prefix lists has been reached.",
    )
    PREFIX_LIST_ENTRY_LIMIT = (
        "PrefixListMaxEntriesExceeded",
        "The prefix list may have {max_entries} entries, not {count}.",
    )
    DHCP_OPTIONS_LIMIT = (
        "DhcpOptionsLimitExceeded",
        "The maximum number of DHCP option sets has been reached.",
    )
    INTERFACE_LIMIT = (
        "NetworkInterfaceLimitExceeded",
        "The maximum number of network interfaces has been reached.",
    )
    TAG_LIMIT = "TagLimitExceeded", "More than {limit} tags"
    NO_FREE_ADDRESS = (
        "InsufficientFreeAddressesInSubnet",
        "The specified subnet does not have enough free addresses to satisfy the request.",
    )
    NO_PUBLIC_BLOCK = (
        "InsufficientAddressCapacity",
        "public_pool {pool} has no block of the size of {cidr} left: set a larger public_pool, "
        "or use smaller subnets",
    )
    NO_ELASTIC_ADDRESS = (
        "InsufficientAddressCapacity",
        "public_pool {pool} has no address left in {elastic}: set a larger public_pool",
    )
    NO_INDEX = (
        "Unavailable",
        "{count} deleted objects of {vpc} have connections that are still being ended: try again",
    )
    BUSY = "RequestLimitExceeded", "Request limit exceeded."


def _shown(text: str) -> str:
    cut = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in cut)
