"""The output of one exec on the host: two files that only grow, and any number of watchers.

A spool is ``stdout`` and ``stderr`` in a directory of their own. Each has a cursor file beside it that says which
segment in the guest is being read and at which offset of the spool that segment begins, so the size of the spool is
all that a new daemon needs to continue with the next byte. The cursor is replaced by rename, after the bytes it speaks
of. Nothing is fsynced: a host that loses its memory loses the guest too.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path

import msgspec

from mica.model.errors import Code, MicaError, invalid
from mica.model.units import GIB, KIB, Bytes, format_size

DEFAULT_LIMIT = Bytes(GIB)
_READ_SIZE = 256 * KIB


class Stream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


class Cursor(msgspec.Struct, frozen=True):
    """Segment ``segment`` begins at offset ``base`` of the spool; ``handles`` of the agent were open on it."""

    segment: int = 0
    base: int = 0
    handles: tuple[int, ...] = ()


class Spool:
    """Both streams of one exec.

    ``limit`` bounds both together, in bytes. ``finished`` opens what is complete, only to be read. Use ``close`` when
    done with writing; watchers end when ``finish`` was called and they have seen everything.
    """

    def __init__(self, directory: Path, *, limit: Bytes = DEFAULT_LIMIT, finished: bool = False) -> None:
        self._directory = directory
        self._limit = limit
        self._finished = finished
        self._changed = asyncio.Event()
        self._files: dict[Stream, int] = {}
        self._sizes: dict[Stream, int] = {}
        if not finished:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stream in Stream:
            try:
                self._sizes[stream] = self.path(stream).stat().st_size
            except FileNotFoundError:
                self._sizes[stream] = 0

    def path(self, stream: Stream) -> Path:
        return self._directory / stream.value

    def size(self, stream: Stream) -> int:
        """Bytes so far."""
        return self._sizes[stream]

    @property
    def finished(self) -> bool:
        return self._finished

    def append(self, stream: Stream, data: bytes) -> None:
        """Add to a stream, all or nothing. Raises ``too-large`` beyond the limit, ``insufficient-disk``."""
        if sum(self._sizes.values()) + len(data) > self._limit:
            raise MicaError(
                Code.TOO_LARGE,
                f"the command wrote more than the {format_size(self._limit)} that are kept of one exec",
                hint="let it write into a file in the guest, and copy that out",
                details={"limit": self._limit},
            )
        if stream not in self._files:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._files[stream] = os.open(self.path(stream), flags, 0o600)
        file, size = self._files[stream], self._sizes[stream]
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(file, view) :]
        except OSError as error:
            os.ftruncate(file, size)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise MicaError(
                Code.INSUFFICIENT_DISK,
                f"no space on the host for the output of a command: {self._directory}",
                hint="free some; the command waits",
                retryable=True,
            ) from error
        self._sizes[stream] = size + len(data)
        self._notify()

    def finish(self) -> None:
        """Nothing more will come: watchers end at the end."""
        self._finished = True
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._notify()

    def close(self) -> None:
        """Stop writing without saying that the output is complete."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, stream: Stream, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield the stream from ``offset`` on, as it comes, until it is finished. Raises ``invalid`` offsets."""
        if offset < 0 or (self._finished and offset > self._sizes[stream]):
            raise invalid(f"offset {offset} is not within the {self._sizes[stream]} bytes of {stream}")
        file: int | None = None
        try:
            while True:
                changed = self._changed
                if offset < self._sizes[stream]:
                    if file is None:
                        file = os.open(self.path(stream), os.O_RDONLY | os.O_CLOEXEC)
                    data = os.pread(file, min(_READ_SIZE, self._sizes[stream] - offset), offset)
                    if not data:
                        raise MicaError(Code.CORRUPT, f"the output kept in {self._directory} was truncated")
                    offset += len(data)
                    yield data
                elif self._finished:
                    return
                else:
                    await changed.wait()
        finally:
            if file is not None:
                os.close(file)

    def cursor(self, stream: Stream) -> Cursor:
        """Where a former daemon was. Raises ``corrupt``."""
        try:
            return msgspec.json.decode(self._cursor_path(stream).read_bytes(), type=Cursor)
        except FileNotFoundError:
            return Cursor()
        except msgspec.MsgspecError as error:
            raise MicaError(Code.CORRUPT, f"{self._cursor_path(stream)} is damaged") from error

    def set_cursor(self, stream: Stream, cursor: Cursor) -> None:
        """Remember it, so that it survives the daemon's death at any instant."""
        path = self._cursor_path(stream)
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(cursor))
        new.replace(path)

    def _cursor_path(self, stream: Stream) -> Path:
        return self._directory / f"{stream.value}.cursor"


class SpoolSink:
    """One stream of a spool as the place where a :class:`SegmentReader` puts what it reads."""

    def __init__(self, spool: Spool, stream: Stream) -> None:
        self._spool = spool
        self._stream = stream

    def position(self) -> int:
        return self._spool.size(self._stream)

    def put(self, data: bytes) -> None:
        self._spool.append(self._stream, data)

    def load(self) -> Cursor:
        return self._spool.cursor(self._stream)

    def save(self, cursor: Cursor) -> None:
        self._spool.set_cursor(self._stream, cursor)
