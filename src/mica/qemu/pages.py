"""Memory of a QEMU process from outside: which pages it has changed, reading them, writing them.

The pages of a private mapping that differ from its file are those swapped out, or present and not backed by the file:
bits 62, 63 and 61 of ``/proc/PID/pagemap`` (Linux, Documentation/admin-guide/mm/pagemap.rst). Contents go through
``/proc/PID/mem`` (proc(5)); both need no more than the right to trace the process.

A file of pages:  8 bytes of magic, 4 of the index's length (little-endian), the index (JSON, :class:`Index`), zeros up
to a multiple of 4096, then the pages of all runs one after another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.units import MIB

PAGE: Final = 4096
_MAGIC: Final = b"MICAPAG1"
_CHUNK: Final = 4 * MIB
# The highest byte of a pagemap entry → 1 when the page was changed: swapped (0x40), or present (0x80) and not the
# file's (0x20).
_CHANGED: Final = bytes(1 if b & 0x40 or (b & 0x80 and not b & 0x20) else 0 for b in range(256))
_RUN: Final = re.compile(b"\x01+")

Run = tuple[int, int]
"""First page and number of pages, from the beginning of a region."""


class Region(msgspec.Struct, frozen=True):
    """Pages of one region. ``address`` is where the guest sees it, 0 for RAM."""

    name: str
    address: int
    size: int
    runs: tuple[Run, ...]

    @property
    def bytes(self) -> int:
        return sum(count for _, count in self.runs) * PAGE


class Index(msgspec.Struct, frozen=True):
    regions: tuple[Region, ...]


class Mapping(msgspec.Struct, frozen=True):
    """A region of guest memory in a process: its host virtual address and size in bytes."""

    start: int
    size: int


def mapping_of(pid: int, inode: int, size: int) -> Mapping:
    """Where a process maps the file with that inode. Raises ``qemu-failed``.

    The kernel may show the one mapping in several pieces, for parts of it may have been advised differently.
    """
    low, high = 0, 0
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if int(words[4]) == inode and "memfd:" in line:
            start, end = (int(word, 16) for word in words[0].split("-"))
            low, high = low or start, end
    if high - low < size:
        raise MicaError(Code.QEMU_FAILED, f"process {pid} does not map the guest's memory as one piece")
    return Mapping(low, size)


def changed(pid: int, where: Mapping) -> tuple[Run, ...]:
    """Runs of pages of a private mapping that are the process's own."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        file.seek(where.start // PAGE * 8)
        entries = _read_whole(file, where.size // PAGE * 8)
    flags = entries[7::8].translate(_CHANGED)
    return tuple((m.start(), m.end() - m.start()) for m in _RUN.finditer(flags))


def _read_whole(file: IO[bytes], length: int) -> bytes:
    parts = []
    while length:
        part = file.read(min(length, _CHUNK))
        if not part:
            raise MicaError(Code.QEMU_FAILED, "the memory map of QEMU ended too soon")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def write_file(pid: int, found: list[tuple[Region, Mapping]], file: Path) -> None:
    """Write the pages of those regions of a process that stands still into ``file``."""
    index = msgspec.json.encode(Index(tuple(region for region, _ in found)))
    head = _MAGIC + len(index).to_bytes(4, "little") + index
    buffer = memoryview(bytearray(_CHUNK))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory, file.open("wb", buffering=0) as out:
        out.write(head + bytes(-len(head) % PAGE))
        for region, where in found:
            for offset, length in _pieces(region):
                part = buffer[:length]
                if os.preadv(memory.fileno(), [part], where.start + offset) != length:
                    raise MicaError(Code.QEMU_FAILED, f"{region.name} of process {pid} could not be read")
                if out.write(part) != length:
                    raise MicaError(Code.INSUFFICIENT_DISK, f"{file} could not be written whole")


def write_into(pid: int, where: Mapping, target: int) -> None:
    """Bring ``target``, a file of the mapping's size, to what the process sees in pages that are its own.

    Only pages that differ are written: what is zero in both stays a hole. The process stands still, or this is
    repeated when it does.
    """
    ours, theirs = memoryview(bytearray(_CHUNK)), memoryview(bytearray(_CHUNK))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for at, length in _pieces(Region("", 0, where.size, changed(pid, where))):
            new, old = ours[:length], theirs[:length]
            if os.preadv(memory.fileno(), [new], where.start + at) != length:
                raise MicaError(Code.QEMU_FAILED, f"memory of process {pid} could not be read")
            if os.preadv(target, [old], at) != length:
                raise MicaError(Code.QEMU_FAILED, "the new RAM image is too short")
            for begin, end in _differing(new, old):
                if os.pwritev(target, [new[begin:end]], at + begin) != end - begin:
                    raise MicaError(Code.INSUFFICIENT_MEMORY, "the new RAM image could not be written whole")


def _differing(new: memoryview, old: memoryview) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of runs of pages that are not the same."""
    if new == old:
        return
    begin: int | None = None
    for at in range(0, len(new), PAGE):
        same = new[at : at + PAGE] == old[at : at + PAGE]
        if same and begin is not None:
            yield begin, at
            begin = None
        elif not same and begin is None:
            begin = at
    if begin is not None:
        yield begin, len(new)


def _pieces(region: Region) -> Iterator[tuple[int, int]]:
    """Offsets and lengths in bytes, none longer than a chunk."""
    for first, count in region.runs:
        at, end = first * PAGE, (first + count) * PAGE
        while at < end:
            yield at, min(_CHUNK, end - at)
            at += min(_CHUNK, end - at)


def read_index(file: Path) -> Index:
    """Raises ``corrupt`` when it is no such file, or not whole."""
    with file.open("rb") as opened:
        head = opened.read(12)
        length = int.from_bytes(head[8:], "little")
        text = opened.read(length)
        try:
            if not head.startswith(_MAGIC):
                raise ValueError("it does not begin as one")
            index = msgspec.json.decode(text, type=Index)
            expected = _begin(length) + sum(region.bytes for region in index.regions)
            if os.fstat(opened.fileno()).st_size != expected:
                raise ValueError(f"it should have {expected} bytes")
            if any(f < 0 or n < 0 or (f + n) * PAGE > r.size for r in index.regions for f, n in r.runs):
                raise ValueError("it names pages beyond its regions")
        except (ValueError, msgspec.MsgspecError) as error:
            raise MicaError(Code.CORRUPT, f"{file} is no file of memory pages: {error}") from error
    return index


def _begin(index_length: int) -> int:
    return (12 + index_length + PAGE - 1) // PAGE * PAGE


def load_region(pid: int, file: Path, name: str, where: Mapping) -> None:
    """Write the pages of one region from ``file`` into a process that stands still. Raises ``corrupt``."""
    index = read_index(file)
    with file.open("rb", buffering=0) as source, Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        source.seek(8)
        at = _begin(int.from_bytes(source.read(4), "little"))
        buffer = memoryview(bytearray(_CHUNK))
        for region in index.regions:
            if region.name != name:
                at += region.bytes
                continue
            if region.size != where.size:
                raise MicaError(Code.CORRUPT, f"{file} has {region.size} bytes of {name}, the machine {where.size}")
            for offset, length in _pieces(region):
                part = buffer[:length]
                if os.preadv(source.fileno(), [part], at) != length:
                    raise MicaError(Code.CORRUPT, f"{file} ended too soon")
                if os.pwritev(memory.fileno(), [part], where.start + offset) != length:
                    raise MicaError(Code.QEMU_FAILED, f"{name} of process {pid} could not be written")
                at += length
