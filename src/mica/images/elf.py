"""What a program needs to run: the shared libraries named in its dynamic section (ELF-64, System V gABI chapter 5)."""

from __future__ import annotations

import struct

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


class ElfError(ValueError):
    """The bytes are not a little-endian ELF-64 file."""


def needed(data: bytes) -> list[str]:
    """Names of the shared libraries that the file asks for, and first the path of its interpreter if it has one."""
    try:
        return _needed(data)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise ElfError(str(error)) from error


def _needed(data: bytes) -> list[str]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ElfError("no ELF-64 header")
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQQQ", data, offset + index * size) for index in range(count)]
    names: list[str] = []
    tags: list[tuple[int, int]] = []
    for kind, _, start, _, _, length, _, _ in segments:
        if kind == _PT_INTERP:
            names.append(_string(data, start))
        if kind == _PT_DYNAMIC:
            tags = list(struct.iter_unpack("<QQ", data[start : start + length - length % 16]))
    if _DT_NULL in [tag for tag, _ in tags]:
        tags = tags[: [tag for tag, _ in tags].index(_DT_NULL)]
    for tag, value in tags:
        if tag == _DT_STRTAB:
            table = _file_offset(segments, value)
            names += [_string(data, table + at) for kind, at in tags if kind == _DT_NEEDED]
    return names


def _file_offset(segments: list[tuple[int, ...]], address: int) -> int:
    for kind, _, start, virtual, _, length, _, _ in segments:
        if kind == _PT_LOAD and virtual <= address < virtual + length:
            return start + address - virtual
    raise ElfError(f"address {address:#x} lies in no segment")


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
