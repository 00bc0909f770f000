"""The runner: takes one operation from wherever its journal stands to its end.

Every event is written before the next thing happens, so killing the daemon between any two lines of this module loses
nothing: the next daemon calls :func:`run` again and it goes on, or goes on going back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from mica.engine import journal as rule
from mica.engine.deadline import within
from mica.engine.definition import Context, Definition, Env, Step, to_plain
from mica.engine.inbox import Decision, judge
from mica.engine.journal import Next
from mica.model.errors import Code, MicaError, Problem, not_found
from mica.model.operation import JournalEntry, Operation, OperationState, StepEvent
from mica.model.transitions import Answer, VmVerb
from mica.model.units import format_duration
from mica.model.vm import VmState

log = structlog.get_logger()
replace = msgspec.structs.replace

# How often progress may be written; watchers see it at most this much late.
PROGRESS_PERIOD_S = 0.25

# A step may wait for a guest or for much to be read; nothing that takes it back does. Seconds.
UNDO_S = 600.0


class Canceller:
    """Somebody's wish that one operation stop. ``requested`` never goes back to False."""

    def __init__(self, *, requested: bool = False) -> None:
        self._event = asyncio.Event()
        if requested:
            self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


class Runner:
    """One run of one operation. Owns the operation's row while it runs. ``blocked``: why it must not begin."""

    def __init__(
        self,
        env: Env,
        definition: Definition,
        operation: Operation,
        canceller: Canceller,
        blocked: MicaError | None = None,
    ) -> None:
        self._blocked = blocked
        self._env = env
        self._definition = definition
        self._operation = operation
        self._canceller = canceller
        self._steps: Sequence[Step] = definition.steps(operation)
        self._names = [step.name for step in self._steps]
        self._progress: tuple[float | None, str] = (operation.progress, operation.step)
        self._progress_at = 0.0
        self._progress_task: asyncio.Task[None] | None = None

    async def run(self) -> Operation:
        """Run to the end; return the ended (or stuck) operation. Raises only on a broken journal or store."""
        try:
            return await self._run()
        finally:
            await self._settle_progress()

    async def _run(self) -> Operation:
        if not self._operation.journal and self._operation.state is not OperationState.UNWINDING:
            ended = await self._begin()
            if ended is not None:
                return ended
        while True:
            unwind = self._operation.state is OperationState.UNWINDING
            action = rule.next_action(self._names, self._operation.journal, unwind=unwind)
            match action.next:
                case Next.DO if self._canceller.requested and not self._must_go_on(action.step):
                    await self._write(lambda o: replace(o, state=OperationState.UNWINDING, problem=_cancelled()))
                case Next.DO:
                    await self._do(self._step(action.step))
                case Next.UNDO:
                    await self._undo(self._step(action.step))
                case Next.SUCCEEDED:
                    return await self._end(OperationState.SUCCEEDED, None)
                case Next.FAILED:
                    problem = self._operation.problem or Problem(Code.INTERNAL, "it failed without saying why")
                    return await self._end(_state_of(problem), problem)
                case Next.STUCK:
                    return await self._write(lambda o: replace(o, state=OperationState.STUCK))

    async def _begin(self) -> Operation | None:
        """Its turn has come: go on if that is still wanted and possible; else end, and take back what was claimed."""
        decision = await self._judge()
        if decision.answer is Answer.IGNORE:
            return await self._end(OperationState.SUCCEEDED, None, {"already": True})
        denied = decision.error.problem() if decision.error else None
        problem = _cancelled() if self._canceller.requested else denied
        now = self._env.clock.now()
        if problem is None:
            await self._write(lambda o: replace(o, state=OperationState.RUNNING, started_at=now), durable=False)
            return None
        if not self._definition.anchored:
            return await self._end(_state_of(problem), problem)
        first = self._names[0]
        entries = (
            JournalEntry(first, StepEvent.STARTED, now),
            JournalEntry(first, StepEvent.FAILED, now, error=problem.message),
        )
        await self._write(lambda o: replace(o, state=OperationState.UNWINDING, problem=problem, journal=entries))
        return None

    async def _judge(self) -> Decision:
        verb, operation = self._definition.state_verb, self._operation
        if self._blocked is not None:
            return Decision(Answer.DENY, VmState.GONE, self._blocked)
        if verb is None:
            return Decision(Answer.ACCEPT, VmState.CREATING)
        status = await self._env.records.statuses.get(operation.target.partition("/")[2])
        if status is None:
            return Decision(Answer.DENY, VmState.GONE, not_found("VM", operation.target_name))
        forced = verb in (VmVerb.DELETE, VmVerb.PURGE) and bool(operation.params.get("force"))
        return judge(operation.target_name, status.value.observed.state, verb, stops_first=forced)

    def _must_go_on(self, name: str) -> bool:
        """No way back before this step: it belongs to the one before, or was begun and cannot be interrupted."""
        step = self._step(name)
        begun = any(entry.step == name for entry in self._operation.journal)
        return step.follows or (begun and not step.cancellable)

    def _step(self, name: str) -> Step:
        return next(step for step in self._steps if step.name == name)

    def _context(self) -> Context:
        return Context(
            env=self._env,
            operation=self._operation,
            outputs=dict(rule.outputs(self._operation.journal)),
            report=self._report,
            failure=self._operation.problem,
        )

    async def _do(self, step: Step) -> None:
        # A step that is repeated after a crash writes "started" again: the journal shows that it was.
        await self._append(step.name, StepEvent.STARTED, durable=False, text=step.words)
        try:
            output = to_plain(await self._bounded(step))
        except MicaError as error:
            await self._fail(step, error)
        except Exception as error:
            log.exception("step failed", operation=self._operation.id, verb=self._operation.verb, step=step.name)
            await self._fail(step, _internal(error))
        else:
            await self._append(step.name, StepEvent.SUCCEEDED, output=output, durable=False)

    async def _bounded(self, step: Step) -> Any:
        """``do`` with its deadline, ended early by a wish to cancel when the step allows that."""
        context = self._context()
        async with asyncio.TaskGroup() as group:
            work = group.create_task(self._quiet(step, context))
            watch = group.create_task(self._canceller.wait()) if step.cancellable else None
            waiting: set[asyncio.Task[Any]] = {work} | ({watch} if watch else set())
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            interrupted = not work.done()
            work.cancel()
            if watch:
                watch.cancel()
        if interrupted:
            raise MicaError.of(_cancelled())
        if work.cancelled():
            raise MicaError(Code.INTERNAL, f"{step.words} lost something it was waiting for", retryable=True)
        outcome = work.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _quiet(self, step: Step, context: Context) -> Any:
        """The outcome as a value: a raised error would make the task group cancel its own waiter first."""
        try:
            async with within(self._env.clock, step.timeout_s) as deadline:
                return await step.do(context)
        except Exception as error:  # noqa: BLE001 - it is handed to the caller, not swallowed
            return _too_slow(step) if deadline.expired() else error

    async def _fail(self, step: Step, error: MicaError) -> None:
        entry = JournalEntry(step.name, StepEvent.FAILED, self._env.clock.now(), error=error.message)
        await self._write(
            lambda o: replace(o, journal=(*o.journal, entry), state=OperationState.UNWINDING, problem=error.problem())
        )

    async def _undo(self, step: Step) -> None:
        await self._append(step.name, StepEvent.UNDO_STARTED, durable=False, text=step.words)
        try:
            if step.undo is not None:
                async with within(self._env.clock, min(step.timeout_s, UNDO_S)):
                    await step.undo(self._context())
        except Exception as error:
            # Whatever it was, guessing on would lie: the operation is stuck and an operator is told.
            log.exception("undo failed", operation=self._operation.id, verb=self._operation.verb, step=step.name)
            text = error.message if isinstance(error, MicaError) else f"{type(error).__name__}: {error}"
            await self._append(step.name, StepEvent.UNDO_FAILED, error=text)
        else:
            await self._append(step.name, StepEvent.UNDO_FINISHED)

    async def _append(
        self,
        step: str,
        event: StepEvent,
        *,
        output: Any = None,
        error: str = "",
        durable: bool = True,
        text: str | None = None,
    ) -> None:
        entry = JournalEntry(step, event, self._env.clock.now(), output, error)
        await self._write(
            lambda o: replace(o, journal=(*o.journal, entry), step=o.step if text is None else text), durable=durable
        )

    async def _end(
        self, state: OperationState, problem: Problem | None, result: dict[str, Any] | None = None
    ) -> Operation:
        if result is None:
            result = self._definition.result(self._context()) if state is OperationState.SUCCEEDED else {}
        now = self._env.clock.now()
        ended = await self._write(
            lambda o: replace(
                o,
                state=state,
                problem=problem,
                started_at=o.started_at or now,
                ended_at=now,
                step="",
                result=msgspec.to_builtins(result),
                progress=1.0 if state is OperationState.SUCCEEDED else o.progress,
            )
        )
        log.info(
            "operation",
            id=ended.id,
            verb=ended.verb,
            target=ended.target_name,
            by=ended.by.name,
            state=ended.state.value,
            ms=round((now - ended.created_at) * 1000),
            problem=problem.message if problem else None,
        )
        self._env.on_ended(ended)
        return ended

    async def _write(self, change: Callable[[Operation], Operation], *, durable: bool = True) -> Operation:
        # Progress in flight must not overtake the journal.
        await self._settle_progress()
        written = await self._env.records.operations.update(self._operation.id, change, durable=durable)
        self._operation = written.value
        return self._operation

    def _report(self, fraction: float | None, text: str) -> None:
        self._progress = (fraction, text)
        now, task = self._env.clock.monotonic(), self._progress_task
        if task is not None:
            if not task.done():
                return
            self._note_progress(task)
        if now - self._progress_at >= PROGRESS_PERIOD_S:
            self._progress_at = now
            self._progress_task = asyncio.get_running_loop().create_task(self._write_progress())

    async def _write_progress(self) -> None:
        fraction, text = self._progress
        self._operation = (
            await self._env.records.operations.update(
                self._operation.id, lambda o: replace(o, progress=fraction, step=text), durable=False
            )
        ).value

    async def _settle_progress(self) -> None:
        task = self._progress_task
        if task is None:
            return
        try:
            await asyncio.wait({task})
        finally:
            # Interrupted here, the run is over: its last act is to wait for this task once more.
            task.cancel()
        self._note_progress(task)

    def _note_progress(self, task: asyncio.Task[None]) -> None:
        self._progress_task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("progress was not written", operation=self._operation.id, error=str(error))


def _too_slow(step: Step) -> MicaError:
    return MicaError(Code.TIMEOUT, f"{step.words} took longer than {format_duration(step.timeout_s)}")


def _state_of(problem: Problem) -> OperationState:
    return OperationState.CANCELLED if problem.code is Code.CANCELLED else OperationState.FAILED


def _cancelled() -> Problem:
    return Problem(Code.CANCELLED, "it was cancelled; what it had done was undone")


def _internal(error: Exception) -> MicaError:
    return MicaError(
        Code.INTERNAL,
        f"a fault in Mica ({type(error).__name__}); the daemon's log has the details",
        hint="report it with the log: `mica daemon log`",
    )
