"""One command in a guest, from its start to its end, across the death of any number of daemons.

The command runs under a runner in the guest (:mod:`mica.guest.script`), which outlives every daemon. This side only
reads: events from the runner's log, output from segments, by offset, into the spool on the host. Dropping a
:class:`GuestExec` at any moment, or losing its process, therefore loses nothing; another one made with
``GuestExecutor.resume`` goes on with the next byte.

What is beyond the spool's limit is not thrown away in silence: the command is ended and the exec ``failed`` with
``too-large``. A full disk on the host makes the command wait instead.
"""

from __future__ import annotations

import asyncio
import signal as signals
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from mica.guest import outcome
from mica.guest.agent import AgentRefusedError, GuestAgent
from mica.guest.ending import Ending, Verdict
from mica.guest.log import CommandEvents, StreamEvents
from mica.guest.patience import Patience
from mica.guest.runner import Runner, Runners
from mica.guest.script import command_script
from mica.guest.segments import SegmentReader
from mica.guest.spool import Spool, SpoolSink, Stream
from mica.guest.stdin import StdinWriter
from mica.guest.tail import Tail, open_tails
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecState

OnChange = Callable[[ExecRecord], Awaitable[None]]

MIN_PAUSE_S = 0.001
MAX_PAUSE_S = 0.1
QUICK_S = 0.05
"""So long we look every few milliseconds: most commands have ended by then."""
_TRANSIENT = frozenset({Code.AGENT_UNAVAILABLE, Code.TIMEOUT, Code.BUSY, Code.INSUFFICIENT_DISK})


class GuestExec:
    """A command under way. Made by :class:`mica.guest.executor.GuestExecutor`; :meth:`run` it until its end.

    ``on_change`` is awaited with every new record: before the command can have started, when it runs, when it ended.
    """

    def __init__(
        self,
        runners: Runners,
        runner: Runner,
        record: ExecRecord,
        spool: Spool,
        on_change: OnChange,
        *,
        patience: Patience,
        resumed: bool,
    ) -> None:
        self.record = record
        self.spool = spool
        self._runners = runners
        self._on_change = on_change
        self._resumed = resumed
        self._patience = patience
        self._readers: dict[Stream, SegmentReader] = {}
        self._stdin: StdinWriter | None = None
        self._submitted = asyncio.Event()
        self._bind(runner)
        self._wake = asyncio.Event()
        self._begun = self._moved = self._checked = time.monotonic()
        self._looks = 0
        self._looked = self._begun
        self._ending = Ending(patience)
        self._lost = ""

    @property
    def _agent(self) -> GuestAgent:
        return self._runner.agent

    @property
    def _events(self) -> CommandEvents:
        return self._runner.log.events

    def _reader(self, first: Tail, start: int, ack: str, stream: Stream) -> SegmentReader:
        sink = SpoolSink(self.spool, stream)
        return SegmentReader(self._agent, first, start, self._runner.path(ack), self._runners.window, sink)

    def _stream_events(self, stream: Stream) -> StreamEvents:
        return self._events.out if stream is Stream.STDOUT else self._events.err

    def _bind(self, runner: Runner) -> None:
        """Let this runner execute it: what a resumed one does already, and a new one as its next command."""
        self._runner = runner
        if not self._resumed:
            self.record = msgspec.structs.replace(
                self.record,
                guest_dir=runner.directory,
                guest_pid=runner.pid,
                sequence=runner.sequence + 1,
                out_start=runner.out.offset,
                err_start=runner.err.offset,
            )
        self._readers = {
            Stream.STDOUT: self._reader(runner.out, self.record.out_start, "ao", Stream.STDOUT),
            Stream.STDERR: self._reader(runner.err, self.record.err_start, "ae", Stream.STDERR),
        }
        self._stdin = StdinWriter(runner.agent, runner) if self.record.spec.stdin else None

    async def _submit(self) -> None:
        """Give the command to the guest; its record has been kept before. A failure ends the exec."""
        try:
            try:
                await self._tell()
            except AgentRefusedError as refusal:
                if not (refusal.absent_file or refusal.lost_handle):
                    raise
                # The agent or the guest was restarted: whatever waited there is gone or cannot be told from it.
                self._runners.forget()
                self._runners.release(self._runner, reusable=False, closing=())
                self._bind(await self._runners.acquire())
                await self._on_change(self.record)
                await self._tell()
        except AgentRefusedError as refusal:
            await self._end(outcome.failed(self.record, await self._agent.explain(refusal)))
        except MicaError as error:
            # Whether the guest has heard of it is not known; its runner is ended, and with it what it may start.
            await self._end(outcome.failed(self.record, error))
        finally:
            self._submitted.set()

    async def _tell(self) -> None:
        sequence = self.record.sequence
        await self._runner.arm(sequence - 1)
        # Not when the agent has answered: a guest with one processor often runs the command first.
        self._begun = self._moved = time.monotonic()
        await self._runner.submit(command_script(self.record.spec, sequence), numbered=sequence)

    # What a user of it does

    async def submitted(self) -> None:
        """Return when the guest has been given the command, or when it turned out that it cannot be."""
        await self._submitted.wait()

    async def write_stdin(self, data: bytes) -> None:
        """Return when the guest has it; waits while the command does not read. :meth:`run` must be running.

        Raises ``state-conflict`` where the command has ended or was started without stdin. What was being written
        when a daemon died may have been delivered; a new daemon can go on writing.
        """
        if self._stdin is None:
            raise MicaError(Code.STATE_CONFLICT, "the command was started without standard input")
        await self._submitted.wait()
        await self._stdin.write(data)
        self._wake.set()

    async def close_stdin(self) -> None:
        """End of input; idempotent, and of no effect where there is no stdin."""
        await self._submitted.wait()
        if self._stdin is not None:
            await self._stdin.close()
            self._wake.set()

    async def kill(self, signal: int = signals.SIGTERM) -> None:
        """Signal the command and everything that descends from it, as soon as it runs. Of no effect after its end."""
        if not self.record.state.final:
            self._ending.signal_soon(int(signal))
            self._wake.set()

    async def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL after a grace of 5 s for whatever is left of it."""
        self._ending.stop_soon(MicaError(Code.CANCELLED, "the command was stopped"))
        self._wake.set()

    def lose(self, reason: str) -> None:
        """The guest has ended, as the owner knows: :meth:`run` ends with state ``lost`` and keeps the output."""
        self._lost = self._lost or reason
        self._wake.set()

    def follow(self, stream: Stream, offset: int = 0) -> AsyncIterator[bytes]:
        """Watch a stream from ``offset`` on; any number may watch. Ends with the exec."""
        return self.spool.follow(stream, offset)

    # The loop

    async def run(self) -> ExecRecord:
        """Start it, read until its end, and return the final record.

        Cancelling this leaves the command running in the guest. A guest that cannot be given the command any more makes
        the exec ``failed``.
        """
        pause = MIN_PAUSE_S
        try:
            if not self._resumed:
                await self._submit()
                pause = self._begun + self._runners.typical_s - time.monotonic()
            self._submitted.set()
            while not self.record.state.final:
                await self._sleep(pause)
                pause = await self._round(pause)
        finally:
            self._submitted.set()
            self.spool.finish() if self.record.state.final else self.spool.close()
            if self._stdin is not None:
                self._stdin.end()
        return self.record

    async def _round(self, pause: float) -> float:
        """Look once, act, and say how long to sleep before the next look."""
        if self._lost:
            await self._end(outcome.lost(self.record, self._lost))
            return 0.0
        try:
            progressed = await self._look()
            if self.record.state.final:
                return 0.0
            await self._act()
        except AgentRefusedError as refusal:
            return await self._trouble(await self._agent.explain(refusal), pause)
        except MicaError as error:
            return await self._trouble(error, pause)
        if progressed:
            return 0.0 if self._hungry() else MIN_PAUSE_S
        if time.monotonic() - self._begun < QUICK_S:
            return MIN_PAUSE_S * 2
        return min(max(pause, MIN_PAUSE_S) * 1.5, MAX_PAUSE_S)

    def _hungry(self) -> bool:
        """More output is known to lie in the guest."""
        return any(
            reader.segment < self._stream_events(stream).complete or reader.tail.full
            for stream, reader in self._readers.items()
        )

    async def _sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    async def _look(self) -> bool:
        """One exchange with the agent; true if something came."""
        if not self._events.over:
            self._looks += 1
            self._looked = time.monotonic()
        runner = self._runner
        first = [reader.tail for reader in self._readers.values() if not reader.segment]
        if not await open_tails(self._agent, [runner.events_tail, *first]):
            await self._end(outcome.lost(self.record, "the guest was restarted"))
            return False
        # The log is read first, so what it calls complete cannot grow after the reads behind it.
        reading = [(s, r) for s, r in self._readers.items() if r.tail.open and not r.exhausted(self._stream_events(s))]
        answers = await self._agent.batch([runner.events_tail.request(), *(r.tail.request() for _, r in reading)])
        progressed = runner.take_log(answers[0])
        if progressed and self._stdin is not None:
            self._stdin.progressed()
        for (stream, reader), answer in zip(reading, answers[1:], strict=True):
            complete = reader.segment < self._stream_events(stream).complete
            progressed |= reader.take(answer, complete)
        for stream, reader in self._readers.items():
            events = self._stream_events(stream)
            await reader.advance(events)
            if not reader.tail.open and not reader.exhausted(events) and events.complete >= reader.segment:
                progressed |= await reader.open()
        if progressed:
            self._moved = time.monotonic()
        if self._finished():
            await self._end(self._ended())
        elif self._events.started and self.record.state is ExecState.STARTING and self._events.exit_code is None:
            await self._change(state=ExecState.RUNNING, pid=self._events.pid)
        return progressed

    @property
    def _guest(self) -> str:
        return self._agent.guest

    def _finished(self) -> bool:
        events = self._events
        if events.exit_code is None:
            return False
        return all(reader.exhausted(self._stream_events(s)) for s, reader in self._readers.items())

    async def _trouble(self, error: MicaError, pause: float) -> float:
        """What a former daemon's death would do to us: go on by offset when the agent answers again."""
        for reader in self._readers.values():
            reader.forget()
        self._runner.drop()
        if error.code is Code.TOO_LARGE:
            await self._give_up(error)
            return 0.0
        if error.code not in _TRANSIENT and not error.details.get("frozen"):
            await self._end(outcome.failed(self.record, error))
            return 0.0
        if self._overdue():
            await self._end(outcome.lost(self.record, "it was to be stopped, and the guest's agent does not answer"))
            return 0.0
        return min(max(pause, MAX_PAUSE_S) * 2, 1.0)

    def _overdue(self) -> bool:
        """It should have been stopped long ago."""
        timeout_s = self.record.spec.timeout_s
        too_old = timeout_s is not None and self._age() > timeout_s + self._patience.give_up_s
        return too_old or self._ending.overdue

    async def _give_up(self, error: MicaError) -> None:
        """End the command because Mica cannot keep what it writes."""
        if self._events.pid is not None:
            await self._ending.send(self._runner, self._events.pid, signals.SIGKILL)
        await self._end(outcome.failed(self.record, error))

    # Time-outs, signals, remains

    async def _act(self) -> None:
        now = time.monotonic()
        spec, events = self.record.spec, self._events
        if events.out.failed or events.err.failed:
            await self._give_up(outcome.guest_full(self._guest))
            return
        if spec.timeout_s is not None and self._age() >= spec.timeout_s:
            self._ending.stop_soon(outcome.timed_out(spec.timeout_s))
        verdict = await self._ending.act(self._runner, events)
        held = events.exit_code is not None and now - self._moved > self._patience.linger_s and not self._ending.begun
        if isinstance(verdict, MicaError):
            await self._end(outcome.failed(self.record, verdict))
        elif verdict is Verdict.GONE or held:
            # Where something in the background holds the output open, that keeps running, and we stop listening.
            await self._end(self._ended())
        elif now - max(self._moved, self._checked) > self._patience.alive_s:
            self._checked = now
            await self._check_alive(now)

    def _ended(self) -> ExecRecord:
        return outcome.ended(self.record, self._events, self._ending.sent, self._ending.reason, self._guest)

    def _age(self) -> float:
        return time.time() - self.record.started_at

    async def _check_alive(self, now: float) -> None:
        """Silence is normal; a runner that is gone is not."""
        if not self._events.started and now - self._begun > self._patience.start_s:
            await self._end(outcome.lost(self.record, "it was never started"))
            return
        if await self._runner.alive():
            return
        # It may have ended between our last look and now.
        self._runner.drop()
        await self._look()
        if not self.record.state.final:
            await self._end(outcome.lost(self.record, "the guest's agent was restarted, or the command was killed"))

    # The record

    async def _change(self, **fields: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **fields)
        await self._on_change(self.record)

    async def _end(self, record: ExecRecord) -> None:
        self.record = msgspec.structs.replace(record, ended_at=time.time(), pid=self._events.pid or record.pid)
        self._runners.background(self._tidy())
        if not self._resumed and self.record.state is ExecState.EXITED:
            self._runners.learn(self._looked - self._begun, self._looks)
        await self._on_change(self.record)

    async def _tidy(self) -> None:
        events = self._events
        # A pump that found no space has ended.
        quick = all((e.ended or 0) <= 1 and not e.failed for e in (events.out, events.err))
        reusable = events.over and quick and not (self._resumed or self._ending.sent or self._stdin or self._lost)
        handles = [handle for reader in self._readers.values() for handle in reader.leftovers()]
        if self._stdin is not None:
            self._stdin.end()
            handles += await self._stdin.leftovers()
        if not self._lost:
            self._runners.release(self._runner, reusable=reusable, closing=handles)
