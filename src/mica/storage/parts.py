"""Files that never change, in one flat directory.

    ROOT/<part>               the file: the daemon's own and read-only, once it is kept or sealed
    ROOT/<part>.layer.json    for a disk's layer, what it was made as (:mod:`mica.storage.layout`)
    ROOT/.<part>.tmp          a file that is being copied here
    ROOT/.scratch/<name>/     files on their way to be parts, on the same file system

Only the daemon may enter the directory: parts hold what guests had in memory and on disk. A machine is shown the files
that it needs by its jail.

The checksum is BLAKE3 over the length of the file, its record, and each block of 1 MiB that is not all zeroes, with
its number. So a hole is as good as zeroes and costs nothing, wherever a file system put it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.units import MIB, Bytes
from mica.ports.parts import Seal
from mica.storage.chain import damaged, layer_record
from mica.storage.files import (
    DEFAULT_RESERVE,
    in_thread,
    make_read_only,
    naming,
    need_space,
    put_in_place,
    sync_file,
)

_PREFIX: Final = "blake3-1m:"
_BLOCK: Final = MIB
_ZEROES: Final = bytes(_BLOCK)
# More threads gain nothing on blocks of this size.
_THREADS: Final = 2
_REPORTS: Final = 100
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_FILE: Final = re.compile(
    rf"(?P<part>{_ID.pattern})(?:\.layer\.json)?|\.(?P<unfinished>{_ID.pattern})(?:\.layer\.json)?\.tmp"
)


class _Stopped(Exception):  # noqa: N818 - not an error: the work was asked to stop
    """Raised by work in a thread that found its event set."""


class DirectoryParts:
    """:class:`mica.ports.parts.Parts` in the directory ``root``. ``reserve`` is what is left free for the host."""

    def __init__(self, root: Path, *, reserve: Bytes = DEFAULT_RESERVE) -> None:
        self._root = root.absolute()
        self._reserve = reserve

    def path(self, part_id: str) -> Path:
        return part_path(self._root, part_id)

    async def scratch(self, name: str) -> Path:
        directory = self._scratch(name)
        with naming(directory):
            make_parts_directory(self._root)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory

    async def drop_scratch(self, name: str) -> None:
        directory = self._scratch(name)
        with naming(directory):
            if directory.exists():
                await in_thread(shutil.rmtree, directory)

    def _scratch(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise invalid(f"{name!r} cannot be the name of a directory for parts")
        return self._root / ".scratch" / name

    async def keep(self, part_id: str, source: Path) -> None:
        """See the protocol. Raises ``corrupt`` too: ``source`` is not a file of its own."""
        path, stop = self.path(part_id), threading.Event()
        with naming(source):
            try:
                found = source.lstat()
            except FileNotFoundError:
                if path.exists():
                    return
                raise not_found("file", str(source), hint="make the snapshot again") from None
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                # Whoever wrote it may be a guest that escaped, and would have us give away another file.
                raise damaged(source, "it is not a regular file with one name")
        with naming(path):
            make_parts_directory(self._root)
            if found.st_dev == self._root.stat().st_dev:
                await in_thread(_move, source, path)
                return
            # st_blocks is in units of 512 bytes (inode(7)).
            need_space(self._root, found.st_blocks * 512, self._reserve)
            await in_thread(_copy, source, path, stop, stop=stop)

    async def need_space(self, size: Bytes) -> None:
        make_parts_directory(self._root)
        need_space(self._root, size, self._reserve)

    async def seal(self, part_id: str, report: Callable[[float], None]) -> Seal:
        """See the protocol. Raises ``not-found``."""
        path = self.path(part_id)
        with naming(path):
            await in_thread(_settle, path)
            digest = await digest_of(path, report)
            return Seal(Bytes(path.stat().st_blocks * 512), digest)

    async def verify(
        self, part_id: str, digest: str, report: Callable[[float], None], *, rate: Bytes | None = None
    ) -> None:
        path = self.path(part_id)
        if not path.exists():
            raise not_found("part", str(path), hint="go back to another snapshot: mica snapshot list")
        with naming(path):
            try:
                await in_thread(_forget_cached, path)
                found = await digest_of(path, report, rate)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise _corrupt(path, "the disk that it lies on cannot read it") from error
        if found != digest:
            raise _corrupt(path, f"its checksum is {found}, not {digest}")

    async def remove(self, part_id: str) -> None:
        path = self.path(part_id)
        with naming(path):
            # The record goes last: a layer without one would be nobody's to read.
            record = layer_record(self._root, part_id)
            for file in (path, _temporary(path), _temporary(record), record):
                await in_thread(_unlink, file)

    async def present(self) -> set[str]:
        """See the protocol; a part that was not finished, or of which only the record is left, counts."""
        with naming(self._root):
            if not self._root.exists():
                return set()
            found = (_FILE.fullmatch(entry) for entry in os.listdir(self._root))
            return {match["part"] or match["unfinished"] for match in found if match}


def part_path(root: Path, part_id: str) -> Path:
    """Raises ``invalid``."""
    if not _ID.fullmatch(part_id):
        raise invalid(f"{part_id!r} cannot be the id of a part")
    return root / part_id


def make_parts_directory(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _move(source: Path, path: Path) -> None:
    # Nothing waits for the disk here, where a machine may be paused meanwhile: sealing does.
    make_read_only(source)
    source.rename(path)


def _copy(source: Path, path: Path, stop: threading.Event) -> None:
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    try:
        copy_data(source, temporary, stop)
        make_read_only(temporary)
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    source.unlink()


def copy_data(source: Path, target: Path, stop: threading.Event) -> None:
    """Copy a file, leaving holes where it has nothing but zeroes. For threads; ``stop`` ends it."""
    target.unlink(missing_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with _reading(source) as from_, os.fdopen(descriptor, "wb", buffering=0) as to:
        for at, block in _blocks(from_, stop):
            _write_all(to.fileno(), block, at)
        to.truncate(os.fstat(from_).st_size)


def _write_all(descriptor: int, block: memoryview, at: int) -> None:
    while block:
        written = os.pwrite(descriptor, block, at)
        block, at = block[written:], at + written


def _settle(path: Path) -> None:
    make_read_only(path)
    sync_file(path)
    sync_file(path.parent)


def _forget_cached(path: Path) -> None:
    """Have what is read next come from the disk: what is in memory says nothing of that."""
    with _reading(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield descriptor
    finally:
        os.close(descriptor)


def _blocks(descriptor: int, stop: threading.Event) -> Iterator[tuple[int, memoryview]]:
    """Offset and content of each block that is not all zeroes; each is good until the next one."""
    size = os.fstat(descriptor).st_size
    block = memoryview(bytearray(_BLOCK))
    at = 0
    while at < size:
        if stop.is_set():
            raise _Stopped
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA) // _BLOCK * _BLOCK
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but holes from here to the end (lseek(2))
                return
            if error.errno != errno.EINVAL:  # a file system that knows no holes shows them as zeroes
                raise
        length = os.preadv(descriptor, [block], at)
        if 0 < length < min(_BLOCK, size - at):
            length = _read_rest(descriptor, block, at, length)
        if block[:length] != _ZEROES[:length]:
            yield at, block[:length]
        at += _BLOCK


def _read_rest(descriptor: int, block: memoryview, at: int, length: int) -> int:
    while length < len(block) and (more := os.preadv(descriptor, [block[length:]], at + length)):
        length += more
    return length


async def digest_of(path: Path, report: Callable[[float], None], rate: Bytes | None = None) -> str:
    """The checksum of a file and its record. ``report`` is called in the event loop."""
    loop, stop = asyncio.get_running_loop(), threading.Event()

    def tell(fraction: float) -> None:
        loop.call_soon_threadsafe(report, fraction)

    return await in_thread(_digest_now, path, tell, stop, rate, stop=stop)


def _digest_now(path: Path, tell: Callable[[float], None], stop: threading.Event, rate: Bytes | None) -> str:
    hasher = blake3(max_threads=_THREADS)
    about = layer_record(path.parent, path.name)
    record = about.read_bytes() if about.exists() else b""
    with _reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        for number in (size, len(record)):
            hasher.update(number.to_bytes(8, "little"))
        hasher.update(record)
        said = 0
        for at, block in _blocks(descriptor, stop):
            hasher.update(at.to_bytes(8, "little"))
            hasher.update(block)
            if rate:
                stop.wait(len(block) / rate)  # which ends at once when it is to stop
            if (now := at * _REPORTS // size) > said:
                said = now
                tell(at / size)
    tell(1.0)
    return _PREFIX + hasher.hexdigest()


def _corrupt(path: Path, what: str) -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"{path} is damaged: {what}",
        hint="go back to another snapshot (mica snapshot list), and look at the disk: dmesg, smartctl -a",
        details={"path": str(path), "found": what},
    )
