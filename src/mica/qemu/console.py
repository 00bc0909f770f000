"""The serial console: a history with offsets that never move, then what comes, for any number of watchers.

QEMU writes all output to a log file whoever looks; that file is the truth. A connection to the serial socket is held
only while somebody watches: it carries input to the guest, and its output is used as a doorbell, nothing more, since
QEMU writes the log right after the socket.

The log is kept short by :mod:`mica.qemu.logs`, which leaves a hole where its beginning was; offsets stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from mica.model.errors import Code, MicaError

log = structlog.get_logger()

FIRST_LOOK = 64 * 1024
CHUNK = 64 * 1024
WRITE_TIMEOUT_S = 10.0
# How long a guest has for what was typed just before the last one left.
LINGER_S = 2.0
# After the doorbell the log may be a moment behind.
SETTLE_S = 0.005


Find = Callable[[], Awaitable[Path | None]]
"""Where a VM's serial socket is now; ``None`` when it has no process."""


class _Line:
    """One VM's connection to its serial port, shared by its watchers."""

    def __init__(self, find: Find) -> None:
        self.find = find
        self.watchers = 0
        self.socket: Path | None = None
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.bell = asyncio.Condition()
        self.rung = 0
        self.ended = False
        self.typed = False
        self.task: asyncio.Task[None] | None = None
        self.opening = asyncio.Lock()


class Consoles:
    """The serial consoles of all VMs of one daemon."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._lines: dict[str, _Line] = {}

    def file(self, vm_id: str) -> Path:
        return self._log_dir / vm_id / "console.log"

    async def follow(self, vm_id: str, find: Find, offset: int | None) -> AsyncIterator[tuple[int, bytes]]:
        """``(offset, data)`` from the history on, then as it comes; ends when the VM's last process does.

        ``offset`` ``None`` begins 64 KiB before the end; one that is no longer kept begins where the history does.
        Of a VM that does not run there is only history. One that goes on in another process goes on here too.
        """
        async with self._watch(vm_id, find) as line:
            at = self._begin(vm_id, offset)
            while True:
                rung = line.rung
                at = self._begin(vm_id, at)  # a slow watcher's place may have been cut away meanwhile
                data = self._read(vm_id, at)
                if data:
                    yield at, data
                    at += len(data)
                    continue
                if line.ended:
                    return
                async with line.bell:
                    while line.rung == rung and not line.ended:
                        await line.bell.wait()
                await asyncio.sleep(SETTLE_S)

    async def write(self, vm_id: str, find: Find, data: bytes) -> None:
        """Type ``data``. Raises ``timeout`` when the guest does not take it, ``state-conflict`` when it has ended."""
        async with self._watch(vm_id, find) as line:
            if line.writer is None:
                raise MicaError(Code.STATE_CONFLICT, "the VM has ended, its console takes no input")
            line.typed = True
            line.writer.write(data)
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await line.writer.drain()
            except TimeoutError as error:
                raise MicaError(Code.TIMEOUT, "the guest does not read its console", retryable=True) from error
            except OSError as error:
                raise MicaError(Code.STATE_CONFLICT, "the VM has just ended") from error

    def tail(self, vm_id: str, size: int) -> bytes:
        """The last ``size`` bytes of the history; empty when there is none."""
        file = self.file(vm_id)
        if not file.exists():
            return b""
        begin = max(self._first(vm_id), file.stat().st_size - size)
        with file.open("rb") as stream:
            stream.seek(begin)
            return stream.read(size)

    async def close(self) -> None:
        for line in list(self._lines.values()):
            await self._hang_up(line)
        self._lines.clear()

    def _first(self, vm_id: str) -> int:
        """The first offset that is still kept."""
        with self.file(vm_id).open("rb") as stream:
            try:
                return os.lseek(stream.fileno(), 0, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole, or empty
                return self.file(vm_id).stat().st_size

    def _begin(self, vm_id: str, offset: int | None) -> int:
        file = self.file(vm_id)
        if not file.exists():
            return 0
        size = file.stat().st_size
        wanted = size - FIRST_LOOK if offset is None else min(offset, size)
        return max(self._first(vm_id), wanted, 0)

    def _read(self, vm_id: str, at: int) -> bytes:
        try:
            with self.file(vm_id).open("rb", buffering=0) as stream:
                stream.seek(at)
                return stream.read(CHUNK)
        except FileNotFoundError:
            return b""

    @asynccontextmanager
    async def _watch(self, vm_id: str, find: Find) -> AsyncIterator[_Line]:
        line = self._lines.setdefault(vm_id, _Line(find))
        line.watchers += 1
        try:
            async with line.opening:
                if line.task is None and await self._dial(line):
                    line.task = asyncio.get_running_loop().create_task(self._listen(line), name="console")
            yield line
        finally:
            line.watchers -= 1
            if line.watchers == 0 and self._lines.get(vm_id) is line:
                del self._lines[vm_id]
                await asyncio.shield(self._hang_up(line))

    async def _dial(self, line: _Line) -> bool:
        """Connect to where the serial port is now, if that is not where we have been."""
        socket, before = await line.find(), line.socket
        line.socket = socket
        if socket is None or socket == before:
            line.ended = True  # there is only history
            return False
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                line.reader, line.writer = await asyncio.open_unix_connection(str(socket))
        except (TimeoutError, OSError):
            line.ended = True  # it has just ended; the history is still there
            return False
        return True

    async def _listen(self, line: _Line) -> None:
        connected = True
        while connected:
            assert line.reader is not None
            assert line.writer is not None
            try:
                while await line.reader.read(CHUNK):
                    await _ring(line)
            except OSError as error:
                log.info("console connection lost", error=str(error))
            line.writer.close()
            connected = await self._dial(line)
        await _ring(line)

    async def _hang_up(self, line: _Line) -> None:
        if line.typed and line.task is not None and line.writer is not None and not line.ended:
            # QEMU forgets what it has not read when the connection ends; one that only says no more is read out.
            with contextlib.suppress(OSError):
                line.writer.write_eof()
                await asyncio.wait({line.task}, timeout=LINGER_S)
        if line.task is not None:
            line.task.cancel()
            await asyncio.wait({line.task})
        if line.writer is not None:
            line.writer.close()


async def _ring(line: _Line) -> None:
    async with line.bell:
        line.rung += 1
        line.bell.notify_all()
