"""Writes `io.sandbox.varlink` from the classes of `sandbox.varlink.calls`.

`python -m tests.unit.api.interface > sandbox/api/io.sandbox.varlink` after a change there; a test
fails until that is done. It is a file of its own because people read it and the agent sends it.
"""

from __future__ import annotations

import inspect
from typing import get_args

import msgspec
from msgspec.inspect import (
    BoolType,
    BytesType,
    DictType,
    EnumType,
    Field,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    NoneType,
    StrType,
    StructType,
    TupleType,
    Type,
    UnionType,
    VarTupleType,
    type_info,
)

from sandbox.errors import SandboxError
from sandbox.varlink import calls, faults

HEAD = """\
# The control socket of a Sandbox agent: what the sandbox command and the Python client call.
#
# Members that may be left out are optional, and left out when they have their default. Times are
# seconds since the epoch, byte strings are base64. A task's lastStatus counts from 1: PROVISIONING,
# PENDING, ACTIVATING, RUNNING, DEACTIVATING, STOPPING, DEPROVISIONING, STOPPED. Descriptors travel
# beside the call (SCM_RIGHTS) and are named by their index.
interface io.sandbox
"""


def spelled(kind: Type, used: list[type]) -> str:
    match kind:
        case UnionType(types=types):
            (one,) = [each for each in types if not isinstance(each, NoneType)]
            return "?" + spelled(one, used).removeprefix("?")
        case StructType(cls=struct):
            if struct not in used:
                used.append(struct)
            return struct.__name__
        case LiteralType(values=values):
            return "(" + ", ".join(str(value) for value in values) + ")"
        case EnumType(cls=enumeration):
            return "int" if issubclass(enumeration, int) else "string"
        case ListType(item_type=item) | VarTupleType(item_type=item):
            return "[]" + spelled(item, used)
        case TupleType(item_types=items):
            (word,) = {spelled(each, used) for each in items}
            return "[]" + word
        case DictType(value_type=value):
            return "[string]" + spelled(value, used)
        case BoolType():
            return "bool"
        case IntType():
            return "int"
        case FloatType():
            return "float"
        case StrType() | BytesType():
            return "string"
    raise TypeError(f"varlink has no word for {kind}")


def member(field: Field, used: list[type]) -> str:
    spelling = spelled(field.type, used)
    if not field.required and not spelling.startswith("?"):
        spelling = "?" + spelling
    return f"{field.encode_name}: {spelling}"


def members(struct: type, used: list[type], indent: str = "  ") -> str:
    info = type_info(struct)
    assert isinstance(info, StructType)
    lines = [member(field, used) for field in info.fields]
    if not lines:
        return "()"
    if len(lines) == 1 and len(lines[0]) < 60:
        return f"({lines[0]})"
    return "(\n" + ",\n".join(indent + line for line in lines) + "\n)"


def comment(documented: type) -> str:
    text = documented.__doc__ or ""
    if not text or documented.__doc__ in [base.__doc__ for base in documented.__mro__[1:]]:
        return ""
    return "".join(f"# {line}".rstrip() + "\n" for line in inspect.cleandoc(text).splitlines())


def methods() -> list[type[calls.Call[msgspec.Struct]]]:  # type: ignore[type-var]
    found = [
        each
        for each in vars(calls).values()
        if isinstance(each, type) and issubclass(each, calls.Call)
    ]
    return [each for each in found if each not in (calls.Call, calls.Stream)]


def errors() -> list[type[SandboxError]]:
    return list(faults.CLASSES.values())


def interface() -> str:
    used: list[type] = []
    parts = []
    for call in methods():
        (reply,) = get_args(call.__orig_bases__[0])  # type: ignore[attr-defined]
        answer = members(reply, used)
        parts.append(f"{comment(call)}method {call.__name__}{members(call, used)} -> {answer}")
    types = []
    for struct in used:  # grows while it is walked
        types.append(f"{comment(struct)}type {struct.__name__} {members(struct, used)}")
    faults_ = [f"{comment(each)}error {each.__name__} {parameters(each)}" for each in errors()]
    return HEAD + "\n" + "\n\n".join([*sorted(types, key=kind_name), *parts, *faults_]) + "\n"


def kind_name(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("type "))


def parameters(error: type[SandboxError]) -> str:
    info = type_info(faults.Fault)
    assert isinstance(info, StructType)
    names = {"message", *faults.FIELDS.get(error, ())}
    return "(" + ", ".join(member(each, []) for each in info.fields if each.name in names) + ")"


if __name__ == "__main__":
    print(interface(), end="")
