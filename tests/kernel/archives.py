"""Tar archives byte by byte: what no tar program would write."""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)
USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \x00", bytes(8)


def number(value: int, length: int) -> bytes:
    """Octal where it fits, else GNU's base-256."""
    octal = b"%0*o" % (length - 1, value) if value >= 0 else b""
    if 0 < len(octal) < length:
        return octal + b"\0"
    return ((1 << 8 * length - 1) | value & ((1 << 8 * length - 1) - 1)).to_bytes(length, "big")


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    magic: bytes = USTAR,
    tail: bytes = b"",
) -> bytes:
    """One header; `tail` is what follows the device numbers."""
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = number(mode, 8)
    block[108:116] = number(uid, 8)
    block[116:124] = number(gid, 8)
    block[124:136] = number(size, 12)
    block[136:148] = number(mtime, 12)
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = magic
    block[345 : 345 + len(tail)] = tail
    return with_checksum(block)


def with_checksum(block: bytes | bytearray) -> bytes:
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def file(name: bytes, content: bytes = b"", **fields: object) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)  # type: ignore[arg-type]


def directory(name: bytes, mode: int = 0o755) -> bytes:
    return header(name, b"5", mode=mode)


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, b"2", link=target, mode=0o777)


def hardlink(name: bytes, target: bytes) -> bytes:
    return header(name, b"1", link=target)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def pax(**records: bytes) -> bytes:
    """An extended header; `__` in a keyword stands for a dot."""
    return raw_pax(b"".join(record(k.replace("__", ".").encode(), v) for k, v in records.items()))


def raw_pax(content: bytes, kind: bytes = b"x") -> bytes:
    return header(b"PaxHeaders/0", kind, size=len(content)) + padded(content)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    content = name + b"\0"
    return header(b"././@LongLink", kind, size=len(content), magic=GNU) + padded(content)


def gnu_sparse(
    name: bytes, extents: list[tuple[int, int]], real_size: int, content: bytes
) -> bytes:
    """An old GNU sparse file; extents beyond four go to continuation blocks."""

    def fields(some: list[tuple[int, int]], room: int) -> bytes:
        packed = b"".join(number(offset, 12) + number(length, 12) for offset, length in some)
        return packed + bytes(24 * room - len(packed))

    first, rest = extents[:4], extents[4:]
    tail = bytes(41) + fields(first, 4) + (b"\1" if rest else b"\0") + number(real_size, 12)
    blocks = header(name, b"S", size=len(content), magic=GNU, tail=tail)
    while rest:
        now, rest = rest[:21], rest[21:]
        blocks += fields(now, 21) + (b"\1" if rest else b"\0") + bytes(7)
    return blocks + padded(content)


def archive(*members: bytes) -> bytes:
    return b"".join(members) + END
