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
from mica.guest.log import CommandEvents, StreamEvents
from mica.guest.runner import Runner, Runners
from mica.guest.script import command_script
from mica.guest.segments import SegmentReader
from mica.guest.spool import Cursor, Spool, Stream
from mica.guest.stdin import StdinWriter
from mica.guest.tail import Tail, open_tails
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecState

OnChange = Callable[[ExecRecord], Awaitable[None]]

MIN_PAUSE_S = 0.001
MAX_PAUSE_S = 0.1
QUICK_S = 0.05
"""So long we look every few milliseconds: most commands have ended by then."""
MAX_KILLS = 5


class Patience(msgspec.Struct, frozen=True):
    """How long an exec waits for what, in seconds.

    ``linger_s``: for output that something in the background holds open after the command has ended. ``grace_s``:
    between SIGTERM and SIGKILL. ``alive_s``: of silence before we look whether the runner still exists. ``start_s``:
    for a command to begin. ``give_up_s``: for an agent that does not answer, once the command is to be stopped.
    """

    linger_s: float = 2.0
    grace_s: float = 5.0
    alive_s: float = 5.0
    start_s: float = 10.0
    give_up_s: float = 30.0


_TRANSIENT = frozenset({Code.AGENT_UNAVAILABLE, Code.TIMEOUT, Code.BUSY, Code.INSUFFICIENT_DISK})


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
        self._runner = runner
        self._on_change = on_change
        self._resumed = resumed
        self._patience = patience
        self._readers = {
            Stream.STDOUT: self._reader(runner.out, record.out_start, "ao", Stream.STDOUT),
            Stream.STDERR: self._reader(runner.err, record.err_start, "ae", Stream.STDERR),
        }
        self._stdin = StdinWriter(runner.agent, runner) if record.spec.stdin else None
        self._wake = asyncio.Event()
        self._begun = self._moved = self._checked = time.monotonic()
        self._looks = 0
        self._looked = self._begun
        self._signals: list[int] = []
        self._sent: list[int] = []
        self._kills: list[float] = []
        self._stopping: MicaError | None = None
        self._stop_asked: float | None = None
        self._start_ticks = ""
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

    async def submit(self) -> None:
        """Give the command to the guest. The record must have been kept before."""
        spec = self.record.spec
        sequence = self.record.sequence
        await self._runner.submit(command_script(spec, sequence), numbered=sequence)
        self._begun = self._moved = time.monotonic()

    # What a user of it does

    async def write_stdin(self, data: bytes) -> None:
        """Return when the guest has it; waits while the command does not read. :meth:`run` must be running.

        Raises ``state-conflict`` where the command has ended or was started without stdin. What was being written
        when a daemon died may have been delivered; a new daemon can go on writing.
        """
        if self._stdin is None:
            raise MicaError(Code.STATE_CONFLICT, "the command was started without standard input")
        await self._stdin.write(data)
        self._wake.set()

    async def close_stdin(self) -> None:
        """End of input; idempotent, and of no effect where there is no stdin."""
        if self._stdin is not None:
            await self._stdin.close()
            self._wake.set()

    async def kill(self, signal: int = signals.SIGTERM) -> None:
        """Signal the command and everything that descends from it, as soon as it runs. Of no effect after its end."""
        if not self.record.state.final:
            self._signals.append(int(signal))
            self._wake.set()

    async def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL after a grace of 5 s for whatever is left of it."""
        self._stopping = self._stopping or MicaError(Code.CANCELLED, "the command was stopped")
        self._stop_asked = self._stop_asked or time.monotonic()
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
        """Read until the end and return the final record. Cancelling it leaves the command running in the guest."""
        pause = MIN_PAUSE_S if self._resumed else self._runners.typical_s
        try:
            while not self.record.state.final:
                await self._sleep(pause)
                pause = await self._round(pause)
        finally:
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
            await self._end(outcome.ended(self.record, self._events, self._sent, self._stopping, self._guest))
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
        if timeout_s is not None and self._age() > timeout_s + self._patience.give_up_s:
            return True
        return self._stop_asked is not None and time.monotonic() - self._stop_asked > self._patience.give_up_s

    async def _give_up(self, error: MicaError) -> None:
        """End the command because Mica cannot keep what it writes."""
        if self._events.pid is not None:
            await self._signal(signals.SIGKILL)
        await self._end(outcome.failed(self.record, error))

    # Time-outs, signals, remains

    async def _act(self) -> None:
        now = time.monotonic()
        spec, events = self.record.spec, self._events
        for failed in (events.out.failed, events.err.failed):
            if failed:
                await self._give_up(outcome.guest_full(self._guest))
                return
        if spec.timeout_s is not None and self._stopping is None and self._age() >= spec.timeout_s:
            self._stopping = outcome.timed_out(spec.timeout_s)
        if events.pid is not None and events.exit_code is None:
            while self._signals:
                await self._signal(self._signals.pop(0))
        if self._stopping is not None:
            await self._escalate(now)
        if events.exit_code is not None and now - self._moved > self._patience.linger_s and not self._kills:
            # Something in the background holds the command's output open. It keeps running; we stop listening.
            await self._end(outcome.ended(self.record, events, self._sent, None, self._guest))
        if now - max(self._moved, self._checked) > self._patience.alive_s:
            self._checked = now
            await self._check_alive(now)

    def _age(self) -> float:
        return time.time() - self.record.started_at

    async def _escalate(self, now: float) -> None:
        pid = self._events.pid
        if pid is None:
            if self._events.started:
                await self._end(outcome.failed(self.record, outcome.no_proc(self._guest)))
            return
        if not self._kills:
            self._kills.append(now)
            await self._signal(signals.SIGTERM)
        elif now - self._kills[-1] >= (self._patience.grace_s if len(self._kills) == 1 else self._patience.linger_s):
            self._kills.append(now)
            left = await self._signal(signals.SIGKILL)
            if self._events.exit_code is not None and not left:
                await self._end(outcome.ended(self.record, self._events, self._sent, self._stopping, self._guest))
            elif len(self._kills) > MAX_KILLS:
                await self._end(outcome.failed(self.record, outcome.unkillable(self._guest, pid)))

    async def _signal(self, signal: int) -> int:
        assert self._events.pid is not None
        self._sent.append(signal)
        count, self._start_ticks = await self._runner.signal(signal, self._events.pid, self._start_ticks)
        return count

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
        quick = all((self._stream_events(s).ended or 0) <= 1 for s in Stream)
        reusable = events.over and quick and not (self._resumed or self._sent or self._stdin or self._lost)
        handles = [handle for reader in self._readers.values() for handle in reader.leftovers()]
        if self._stdin is not None:
            self._stdin.end()
            handles += await self._stdin.leftovers()
        if not self._lost:
            self._runners.release(self._runner, reusable=reusable, closing=handles)
