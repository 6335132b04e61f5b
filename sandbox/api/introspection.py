"""org.varlink.service, which every varlink service answers: who am I, what do I speak."""

from __future__ import annotations

from importlib import resources

import sandbox
from sandbox.api.connection import SERVICE, Connection, Methods
from sandbox.errors import InvalidParameterException
from sandbox.model.task import Record
from sandbox.varlink.calls import Call
from sandbox.varlink.faults import INTERFACE

INTERFACES = (SERVICE, INTERFACE)


class Info(Record, frozen=True, kw_only=True):
    vendor: str
    product: str
    version: str
    url: str
    interfaces: tuple[str, ...]


class Description(Record, frozen=True, kw_only=True):
    description: str


class GetInfo(Call[Info], frozen=True, kw_only=True):
    pass


class GetInterfaceDescription(Call[Description], frozen=True, kw_only=True):
    interface: str


async def get_info(at: Connection, call: GetInfo) -> Info:
    return Info(
        vendor="Sandbox",
        product="sandbox agent",
        version=sandbox.__version__,
        url="",
        interfaces=INTERFACES,
    )


async def get_interface_description(at: Connection, call: GetInterfaceDescription) -> Description:
    if call.interface not in INTERFACES:
        raise InvalidParameterException(f"there is no interface {call.interface!r} here")
    return Description(description=description(call.interface))


METHODS: Methods = {
    f"{SERVICE}.GetInfo": (GetInfo, get_info),
    f"{SERVICE}.GetInterfaceDescription": (GetInterfaceDescription, get_interface_description),
}


def description(interface: str) -> str:
    """The interface description, as it stands beside this module."""
    return (resources.files("sandbox.api") / f"{interface}.varlink").read_text()
