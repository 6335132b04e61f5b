"""What can be wanted of the network: EC2's verbs over VPCs, checked and written as EC2 does it.

An operation is a pure decision over a `Draft`, a transaction in the making: it reads rows, refuses
in EC2's words (`refusals`) or adds what it writes. `commit` writes a draft whole or not at all, and
decides again when somebody else was faster. So operations compose: the default VPC is a dozen of
them in one transaction, and an interface is taken in the one that accepts its task.

    subnet = await commit(region, lambda draft: create_subnet(draft, vpc_id, "10.0.1.0/24"))

Rows (`rows`). All of a VPC is under `vpc/<vpc id>/`: one watch of `vpc/` hears of everything that
changes in one, and the key says in which:

    vpc/<vpc>/vpc                          Vpc
    vpc/<vpc>/ledger                       VpcLedger: who changes the VPC's shape writes it, so two
                                           of them conflict
    vpc/<vpc>/subnet/<id>                  Subnet; likewise route-table, network-acl, group,
                                           nat-gateway, internet-gateway
    vpc/<vpc>/prefix-list/<id>             a copy of each list that a group of the VPC names
    vpc/<vpc>/addresses/<subnet>           Addresses: whose turn it is in that subnet
    vpc/<vpc>/interface/<private address>  NetworkInterface: the key is the claim on the address
    ec2/ledger                             RegionLedger, as above for the region
    ec2/internet-gateway/<id>              a detached one; it moves when it is attached
    ec2/elastic-address/<id>, ec2/prefix-list/<id>, ec2/dhcp-options/<id>
    ec2/link/<8 hex digits>                Link: the interface whose link has that name

Taking an interface writes three rows that only others in the same subnet write (`addresses`, the
interface, the link) and compares those that it read: it conflicts with no other subnet.
"""

from sandbox.control.vpc.draft import Draft as Draft
from sandbox.control.vpc.draft import commit as commit
from sandbox.control.vpc.region import Region as Region
from sandbox.control.vpc.rows import load as load
