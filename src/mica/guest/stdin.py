"""Standard input of a command: written as files into the guest, fed to the command from there.

Not straight into a FIFO: the agent's writes go through C stdio on a non-blocking descriptor, and what it drops when a
FIFO is full it does not tell. A file takes everything, the feeder in the guest blocks in the agent's place, and the
log says which files were taken, so that at most ``MAX_FILES`` of 1 MiB lie in the guest.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from mica.guest.agent import AgentRefusedError, GuestAgent
from mica.guest.runner import Runner
from mica.model.errors import Code, MicaError
from mica.model.units import KIB, MIB

FILE_SIZE = MIB
CHUNK = 512 * KIB
MAX_FILES = 4


class StdinWriter:
    """The writing end of one command's stdin. ``taken`` is called with the log's count of files by the exec's loop."""

    def __init__(self, agent: GuestAgent, runner: Runner) -> None:
        self._agent = agent
        self._runner = runner
        self._epoch = secrets.token_hex(3)
        self._lock = asyncio.Lock()
        self._files = 0
        self._taken_before = runner.log.events.stdin_taken
        self._taken = asyncio.Event()
        self._size = 0
        self._handle: int | None = None
        self._bell: int | None = None
        self._ended: MicaError | None = None

    def progressed(self) -> None:
        """The log may say that a file was taken."""
        self._taken.set()

    def end(self) -> None:
        """The command has ended: whoever writes gets ``state-conflict``."""
        self._ended = self._ended or MicaError(Code.STATE_CONFLICT, "the command has ended: it reads no more input")
        self._taken.set()

    async def write(self, data: bytes) -> None:
        """Return when the guest has it. Waits while the command does not read. Raises ``state-conflict``."""
        async with self._lock:
            for start in range(0, len(data), CHUNK):
                await self._write(data[start : start + CHUNK])

    async def _write(self, data: bytes) -> None:
        self._check()
        if self._bell is None:
            self._bell = await self._agent.file_open(self._runner.path("s"), "r+")
        word = b"d\n"
        if self._handle is None or self._size + len(data) > FILE_SIZE:
            word = await self._next_file()
        assert self._handle is not None
        agent = self._agent
        answers = await agent.batch(
            [
                agent.write_request(self._handle, data),
                agent.flush_request(self._handle),
                agent.write_request(self._bell, word),
                agent.flush_request(self._bell),
            ]
        )
        await self._check_all(answers)
        self._size += len(data)

    async def _next_file(self) -> bytes:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            await self._agent.file_close(handle)
        while self._files - (self._runner.log.events.stdin_taken - self._taken_before) > MAX_FILES:
            self._taken.clear()
            await self._taken.wait()
            self._check()
        name = f"in.{self._epoch}.{self._files}"
        self._handle = await self._agent.file_open(self._runner.path(name), "w")
        self._files += 1
        self._size = 0
        return f"n {name}\n".encode()

    async def close(self) -> None:
        """End of input, after everything that was written. Idempotent."""
        async with self._lock:
            if self._ended is not None:
                return
            self._ended = MicaError(Code.STATE_CONFLICT, "the command's input was closed")
            agent = self._agent
            if self._bell is None:
                self._bell = await agent.file_open(self._runner.path("s"), "r+")
            word = b"q\n"
            await self._check_all(
                await agent.batch([agent.write_request(self._bell, word), agent.flush_request(self._bell)])
            )

    async def leftovers(self) -> list[int]:
        """Handles to give back to the agent when the command has ended."""
        async with self._lock:
            handles = [handle for handle in (self._handle, self._bell) if handle is not None]
            self._handle = self._bell = None
        return handles

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    async def _check_all(self, answers: Sequence[object]) -> None:
        for answer in answers:
            if isinstance(answer, AgentRefusedError):
                raise await self._agent.explain(answer) from answer
