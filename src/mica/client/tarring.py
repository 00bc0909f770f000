"""Files as tar streams on the caller's side: packing what goes into a guest, unpacking what comes out of one.

What comes out of a guest is hostile input: it is unpacked with Python's ``data`` filter (PEP 706), which refuses
absolute paths, ``..``, links that lead out and devices, into a directory beside the destination, and moved into place
only when the whole stream has arrived. The format is pax (POSIX.1-2001), as ``tarfile`` writes it.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import IO, cast

from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.units import MIB, format_size

CHUNK = MIB
END = bytes(2 * tarfile.BLOCKSIZE)
"""Two blocks of zeros end an archive: without them it was cut off, even at the border of a file."""

Count = Callable[[int], None]
"""Called with the bytes of the stream so far."""


def measure(source: Path) -> int:
    """Bytes that :func:`pack` will give, about: for showing progress and for checking the space there."""
    total = len(END)
    for path in _walk(source):
        status = path.lstat()
        total += tarfile.BLOCKSIZE
        if path.is_file() and not path.is_symlink():
            total += -(-status.st_size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return total


async def pack(source: Path, name: str, *, count: Count | None = None) -> AsyncIterator[bytes]:
    """A tar stream of a file, link or directory, called ``name`` in it, owned by root, modes and times kept.

    Raises ``not-found``, and ``invalid`` for devices, FIFOs, sockets and for a file that changes while it is read.
    """
    if not name or "/" in name or name in (".", ".."):
        raise invalid(f"{name!r} is not a name for a file in a guest")
    if not os.path.lexists(source):
        raise not_found("file", str(source))
    pieces = _gather(_pack(source, name))
    done = 0
    try:
        while piece := await asyncio.to_thread(next, pieces, b""):
            done += len(piece)
            if count is not None:
                count(done)
            yield piece
    finally:
        pieces.close()


def _walk(source: Path) -> Iterator[Path]:
    yield source
    if source.is_dir() and not source.is_symlink():
        for child in sorted(source.iterdir()):
            yield from _walk(child)


def _gather(pieces: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Small pieces together, so that each step is worth a thread's while."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        if len(waiting) >= CHUNK:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


def _pack(source: Path, name: str) -> Iterator[bytes]:
    # Only what tarfile knows about headers is wanted; it writes its own end of archive to nowhere.
    with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _walk(source):
            inside = name if path == source else f"{name}/{path.relative_to(source)}"
            info = cast("tarfile.TarInfo | None", tar.gettarinfo(path, inside))  # None for a socket
            if info is None or not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
                raise invalid(f"{path} is a device, FIFO or socket: it cannot be copied", hint="leave it out")
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            yield info.tobuf(tar.format, "utf-8", "surrogateescape")
            if info.isreg():
                yield from _content(path, info.size)
    yield END


def _content(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with path.open("rb") as file:
        while left:
            piece = file.read(min(CHUNK, left))
            if not piece:
                raise invalid(f"{path} became shorter while it was read", hint="copy it when nothing writes to it")
            left -= len(piece)
            yield piece
    yield bytes(-size % tarfile.BLOCKSIZE)


async def unpack(stream: AsyncIterator[bytes], dest: Path, *, count: Count | None = None) -> Path:
    """Unpack a tar stream with one top entry and return where that is now.

    It lands in ``dest`` under its own name where ``dest`` is a directory, else as ``dest``. An existing file is
    replaced at once; an existing directory is not touched. Nothing is there before everything is.

    Raises ``not-found`` (no directory to land in), ``exists``, ``corrupt`` (a path trick, a device, a cut stream),
    ``insufficient-disk``, and what the stream raises.
    """
    inside = dest.is_dir()
    parent = dest if inside else dest.parent
    if not parent.is_dir():
        raise not_found("directory", str(parent))
    stage = Path(tempfile.mkdtemp(prefix=".mica-cp-", dir=parent))
    loop = asyncio.get_running_loop()
    reader = _Reader(stream, loop, count)
    try:
        await _in_thread(_unpack, reader, stage)
        entries = list(stage.iterdir())
        if len(entries) != 1:
            raise MicaError(Code.CORRUPT, f"the stream holds {len(entries)} entries at its top, one was expected")
        return _land(entries[0], parent / entries[0].name if inside else dest)
    finally:
        await asyncio.to_thread(shutil.rmtree, stage, ignore_errors=True)


async def _in_thread(work: Callable[[_Reader, Path], None], reader: _Reader, stage: Path) -> None:
    """Like ``to_thread``, and a cancelled copy waits until the thread has stopped writing."""
    task = asyncio.ensure_future(asyncio.to_thread(work, reader, stage))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        reader.stop()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


def _land(entry: Path, target: Path) -> Path:
    if target.is_dir() and not target.is_symlink():
        raise MicaError(
            Code.EXISTS,
            f"{target} is there already",
            hint="name another destination, or remove it first",
            details={"path": str(target)},
        )
    entry.replace(target)
    return target


def _unpack(reader: _Reader, stage: Path) -> None:
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", reader), mode="r|", bufsize=CHUNK) as tar:
            for member in tar:
                _room(member, stage)
                tar.extract(member, stage, set_attrs=True, filter="data")
        reader.drain()
    except tarfile.FilterError as error:
        raise MicaError(
            Code.CORRUPT,
            f"the guest sent what must not be unpacked: {error}",
            hint="to copy links that lead elsewhere or devices, make an archive in the guest and copy that",
        ) from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise MicaError(Code.CORRUPT, f"the stream is not a whole tar archive: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(stage, 0) from error
        raise invalid(f"could not write to {stage.parent}: {error.strerror}") from error
    if not reader.whole:
        raise MicaError(Code.CORRUPT, "the stream was cut off before its end", retryable=True)


def _room(member: tarfile.TarInfo, stage: Path) -> None:
    if member.size > shutil.disk_usage(stage).free:
        raise _no_room(stage, member.size)


def _no_room(stage: Path, size: int) -> MicaError:
    free = shutil.disk_usage(stage).free
    needed = f"needs {format_size(size)}, " if size else ""
    return MicaError(
        Code.INSUFFICIENT_DISK,
        f"no space for the copy in {stage.parent}: {needed}{format_size(free)} free",
        hint="free some, or copy to another file system",
        details={"needed": size, "free": free},
    )


class _Reader:
    """The stream as ``tarfile`` wants it, in a thread: ``read`` waits for the event loop to bring more."""

    def __init__(self, stream: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop, count: Count | None) -> None:
        self._stream = stream
        self._loop = loop
        self._count = count
        self._waiting = b""
        self._tail = b""
        self._done = 0
        self._stopped = False

    @property
    def whole(self) -> bool:
        """The stream ended as an archive does."""
        return self._done % tarfile.BLOCKSIZE == 0 and self._tail == END

    def stop(self) -> None:
        self._stopped = True

    def read(self, size: int) -> bytes:
        while len(self._waiting) < size and (piece := self._next()):
            self._waiting += piece
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        return data

    def drain(self) -> None:
        """Read to the end, behind the end of the archive too: the stream's last word may be that it was wrong."""
        self._waiting = b""
        while self._next():
            continue

    def _next(self) -> bytes:
        if self._stopped:
            raise EOFError("the copy was stopped")
        piece = asyncio.run_coroutine_threadsafe(self._pull(), self._loop).result()
        self._done += len(piece)
        self._tail = (self._tail + piece)[-len(END) :]
        if self._count is not None and piece:
            self._loop.call_soon_threadsafe(self._count, self._done)
        return piece

    async def _pull(self) -> bytes:
        async for piece in self._stream:
            if piece:
                return piece
        return b""
