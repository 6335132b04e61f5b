"""Two tasks and the router between them, in throw-away namespaces, with rules small enough to read.

A (10.0.0.4) is in group 1, B (10.0.1.4) in group 2; connection marks are as `sandbox.network` has
them: the group of the sender in the high half, that of the receiver in the low one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from msgspec.structs import replace

from sandbox.kernel import native
from sandbox.kernel.netfilter import Backend, Chain, Iptables, Rule, RuleSet, Table
from sandbox.kernel.netlink import Netlink, VethEnd
from sandbox.kernel.thread import KernelThread
from sandbox.model.vpc import Network, Revocation, SecurityGroupRule
from tests.networks import egress, group, interface, network, subnet

A, B = "10.0.0.4", "10.0.1.4"
ENI_A, ENI_B = "eni-aaaaaaaaaaaaaaaaa", "eni-bbbbbbbbbbbbbbbbb"
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/netfilter/nf_conntrack_tcp_loose": "0",
    "net/netfilter/nf_conntrack_acct": "1",
    "net/netfilter/nf_conntrack_timestamp": "1",
}
ACCEPT_ESTABLISHED: Rule = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
DROP: Rule = ("-j", "DROP")


@dataclass(frozen=True)
class Place:
    router: KernelThread
    a: KernelThread
    b: KernelThread
    iptables: Iptables

    def allow(
        self,
        *ingress: Rule,
        egress: Sequence[Rule] = ((),),
        acl: Sequence[Rule] = (),
        drops: Sequence[Chain] = (),
        drop_in: Rule = DROP,
        drop_out: Rule = DROP,
    ) -> None:
        """Make these the rules of B's group, and of A's; a rule is what matches. Those of `acl`
        are whole, and come before all others."""
        invalid = ("-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
        chains = (
            Chain("FORWARD", (*acl, ACCEPT_ESTABLISHED, invalid, ("-j", "ge1"), drop_out), "DROP"),
            Chain(
                "POSTROUTING", (ACCEPT_ESTABLISHED, ("-o", "fgb", "-j", "gi2"), drop_in), "ACCEPT"
            ),
            Chain("ge1", tuple((*rule, "-g", "ae1") for rule in egress)),
            Chain("gi2", tuple((*rule, "-g", "ai2") for rule in ingress)),
            Chain(
                "ae1", (("-j", "CONNMARK", "--set-xmark", "0x10000/0xffff0000"), ("-j", "ACCEPT"))
            ),
            Chain("ai2", (("-j", "CONNMARK", "--set-xmark", "0x2/0xffff"), ("-j", "ACCEPT"))),
            *drops,
        )
        self.router.call(self.iptables.load, RuleSet(tables=(Table("mangle", chains),)))

    def connected(self, port: int) -> tuple[socket.socket, socket.socket]:
        """A TCP connection from A to B: both ends of it."""
        with self.b.call(socket.create_server, (B, port)) as server:
            client = self.a.call(socket.create_connection, (B, port), 5.0)
            accepted = server.accept()[0]
        for each in (client, accepted):
            each.settimeout(5)
        return client, accepted


def vpc(*rules: SecurityGroupRule, revocation: Revocation = "immediate") -> Network:
    """The same as a network, with these rules in the group of B."""
    made = network(
        subnet("subnet-a", "10.0.0.0/28"),
        subnet("subnet-b", "10.0.1.0/28"),
        interface(ENI_A, "subnet-a", A, "sg-a"),
        interface(ENI_B, "subnet-b", B, "sg-b"),
        group("sg-a", egress("-1"), index=1),
        group("sg-b", *rules, index=2),
    )
    return replace(made, vpc=replace(made.vpc, revocation=revocation))


@contextmanager
def routed(lock_file: Path, backend: Backend) -> Iterator[Place]:
    with ExitStack() as stack:
        router, a, b = (stack.enter_context(KernelThread(name)) for name in ("router", "a", "b"))
        for thread in (router, a, b):
            thread.call(native.unshare, native.CLONE_NEWNET)
        place = Place(router, a, b, Iptables(backend, str(lock_file)))
        place.allow()  # connection tracking has no settings before a rule asks for it
        router.call(set_up_router)
        for number, (thread, link, address) in enumerate(((a, "fga", A), (b, "fgb", B))):
            with os.fdopen(thread.call(own_namespace), "rb") as namespace:
                router.call(join, namespace.fileno(), link, number, address)
            thread.call(set_up_task, number, address)
        yield place


def own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def set_up_router() -> None:
    with Netlink() as netlink:
        netlink.set_loopback_up()
    for name, value in SYSCTLS.items():
        path = Path("/proc/sys", name)
        if not name.endswith("timestamp") or path.exists():  # not every kernel has it
            path.write_text(value)


def mac(number: int, end: int) -> str:
    return f"02:00:00:00:{number:02x}:{end:02x}"


def join(namespace: int, link: str, number: int, address: str) -> None:
    near, far = VethEnd(name=link, mac=mac(number, 1)), VethEnd(name="eth0", mac=mac(number, 2))
    with Netlink() as netlink:
        made = netlink.create_veth(near, far, far_netns_fd=namespace, mtu=1500)
        netlink.add_link_route(ip_network(f"{address}/32"), made.index)
        netlink.set_neighbour(made.index, ip_address(address), mac(number, 2))


def set_up_task(number: int, address: str) -> None:
    gateway = ip_address("169.254.0.1")
    with Netlink() as netlink:
        netlink.set_loopback_up()
        link = netlink.find("eth0")
        assert link is not None
        netlink.set_up(link.index)
        netlink.add_address(link.index, ip_interface(f"{address}/32"))
        netlink.add_link_route(ip_network(f"{gateway}/32"), link.index)
        netlink.add_route(ip_network("0.0.0.0/0"), gateway, link.index)
        netlink.set_neighbour(link.index, gateway, mac(number, 1))
