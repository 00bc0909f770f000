"""A command in a guest that has no shell: what the agent alone can do.

Output comes when the command has ended and is at most what the agent captures (16 MiB for each stream); the agent
tells the end once, so a daemon that dies in that instant loses it; time-outs cannot end the command, only the waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from msgspec.structs import replace

from mica.guest import outcome
from mica.guest.agent import AgentRefusedError, GuestAgent
from mica.guest.replies import ExecStatus
from mica.guest.spool import Spool, Stream
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecState

MAX_PAUSE_S = 0.1


class PlainExec:
    """Has the interface of :class:`mica.guest.exec.GuestExec`, as far as the guest allows."""

    def __init__(
        self,
        agent: GuestAgent,
        record: ExecRecord,
        spool: Spool,
        on_change: Callable[[ExecRecord], Awaitable[None]],
    ) -> None:
        self.record = record
        self.spool = spool
        self._agent = agent
        self._on_change = on_change
        self._lost = ""

    async def run(self) -> ExecRecord:
        """Wait for the end and return the final record."""
        pause = 0.001
        try:
            while not self.record.state.final:
                await self._look()
                await asyncio.sleep(pause)  # the agent has no way to tell
                pause = min(pause * 1.5, MAX_PAUSE_S)
        finally:
            self.spool.finish() if self.record.state.final else self.spool.close()
        return self.record

    async def _look(self) -> None:
        timeout_s = self.record.spec.timeout_s
        if self._lost:
            return await self._end(outcome.lost(self.record, self._lost))
        try:
            status = await self._agent.exec_status(self.record.guest_pid)
        except AgentRefusedError:
            return await self._end(outcome.lost(self.record, "the agent does not know it any more"))
        except MicaError as error:
            if not error.retryable:
                return await self._end(outcome.failed(self.record, error))
            return None
        if status.exited:
            await self._take(status)
        elif timeout_s is not None and time.time() - self.record.started_at > timeout_s:
            await self._end(outcome.failed(self.record, outcome.timed_out(timeout_s)))
        return None

    async def _take(self, status: ExecStatus) -> None:
        record = replace(self.record, exit_code=status.exitcode, signal=status.signal, state=ExecState.EXITED)
        if status.signal is not None:
            record = replace(record, exit_code=128 + status.signal)
        try:
            self.spool.append(Stream.STDOUT, status.out_data)
            self.spool.append(Stream.STDERR, status.err_data)
        except MicaError as error:
            record = outcome.failed(record, error)
        if status.out_truncated or status.err_truncated:
            cut = MicaError(Code.TOO_LARGE, "the agent captured only the first part of the command's output")
            record = outcome.failed(record, cut)
        await self._end(record)

    async def _end(self, record: ExecRecord) -> None:
        self.record = replace(record, ended_at=time.time())
        await self._on_change(self.record)

    async def write_stdin(self, data: bytes) -> None:
        raise MicaError(Code.STATE_CONFLICT, f"a command in {self._agent.guest} can have no input: it has no shell")

    async def close_stdin(self) -> None:
        """There is none."""

    async def kill(self, signal: int = 15) -> None:
        raise MicaError(Code.STATE_CONFLICT, f"a command in {self._agent.guest} cannot be signalled: it has no shell")

    async def stop(self) -> None:
        await self.kill()

    def lose(self, reason: str) -> None:
        """The guest has ended, as the owner knows."""
        self._lost = self._lost or reason

    def follow(self, stream: Stream, offset: int = 0) -> AsyncIterator[bytes]:
        return self.spool.follow(stream, offset)
