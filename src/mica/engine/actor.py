"""One task for each VM: operations on it run one after another, and what happens to its machine is seen in between.

           submit ──► inbox (bounded) ──► operation ──► observe
    machine events ──────────────────────────────────► observe      (an event only means: look again)

While an operation runs, it alone moves the observed state; afterwards, and at every event without one, the actor looks
at the machine and writes what it sees. Nothing is remembered that could be read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import structlog

from mica.engine.deadline import within
from mica.engine.definition import Definition, Env
from mica.engine.saga import Canceller, Runner
from mica.engine.settle import set_state, settle
from mica.model.errors import MicaError
from mica.model.operation import Operation, OperationState
from mica.model.transitions import LIVE, VmVerb
from mica.model.vm import AgentState, VmObserved, VmState
from mica.ports.hypervisor import EventKind, Exit, Machine, MachineEvent, RunState

log = structlog.get_logger()
replace = msgspec.structs.replace

# Between the last word of a dying QEMU's monitor and the end of its process. Seconds.
DYING_S = 2.0


class Waiting:
    """An accepted operation in an inbox, with the wish to cancel it."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.canceller = Canceller(requested=operation.cancel_requested)


class Actor:
    """Runs the operations on one target, oldest first. For images this is all; VMs add what :class:`VmActor` does."""

    def __init__(self, env: Env, definitions: Mapping[str, Definition], target: str, group: asyncio.TaskGroup) -> None:
        self.target = target
        self._env = env
        self._definitions = definitions
        self._group = group
        self._waiting: deque[Waiting] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.lock = asyncio.Lock()

    def start(self) -> None:
        self._task = self._group.create_task(self._run(), name=f"actor {self.target}")

    async def stop(self) -> None:
        """Stop where it stands: what is under way goes on with the next daemon."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    @property
    def idle(self) -> bool:
        return not self._waiting

    @property
    def waiting(self) -> tuple[Operation, ...]:
        """Accepted and not ended, oldest (the running one) first."""
        return tuple(w.operation for w in self._waiting)

    def enqueue(self, operation: Operation) -> None:
        """Hand over an operation that the store already holds."""
        self._waiting.append(Waiting(operation))
        self._wake.set()

    def cancel(self, operation_id: str) -> bool:
        for waiting in self._waiting:
            if waiting.operation.id == operation_id:
                waiting.canceller.request()
                return True
        return False

    async def _run(self) -> None:
        while True:
            while self._waiting:
                await self._run_next()
            self._wake.clear()
            await self._wake.wait()

    async def _run_next(self) -> None:
        first = self._waiting[0]
        try:
            first.operation = (await self._env.records.operations.need(first.operation.id)).value
            if not first.operation.state.ended and first.operation.state is not OperationState.STUCK:
                definition = self._definitions[first.operation.verb]
                await Runner(self._env, definition, first.operation, first.canceller).run()
        except Exception:  # the root of this task: one broken operation must not end the actor
            log.exception("operation could not be run", operation=first.operation.id)
        self._waiting.popleft()


class VmActor(Actor):
    """The actor of one VM: holds its machine while there is one."""

    def __init__(
        self,
        env: Env,
        definitions: Mapping[str, Definition],
        vm_id: str,
        group: asyncio.TaskGroup,
        on_settled: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(env, definitions, f"vm/{vm_id}", group)
        self.vm_id = vm_id
        self.machine: Machine | None = None
        self._on_settled = on_settled
        self._listener: asyncio.Task[None] | None = None
        self._look = False
        self._exit: Exit | None = None

    async def attach(self) -> Machine | None:
        """Connect by the recorded runtime; ``None`` when there is none or its process is gone."""
        if self.machine is not None:
            return self.machine
        status = await self._env.records.statuses.get(self.vm_id)
        if status is None or status.value.runtime is None:
            return None
        self.machine = await self._env.hypervisor.attach(status.value.runtime)
        if self.machine is not None:
            self._exit = None
            self._listener = self._group.create_task(self._listen(self.machine), name=f"events {self.vm_id}")
        return self.machine

    def detach(self) -> None:
        self.machine = None
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait({self._listener})
        await super().stop()

    def look(self) -> None:
        """Something may have changed: look at the machine when no operation has it."""
        self._look = True
        self._wake.set()

    async def _listen(self, machine: Machine) -> None:
        try:
            async for event in machine.events():
                self._heard(event)
        except MicaError as error:
            log.warning("lost sight of a machine", vm=self.vm_id, error=error.message)
        self._exit = await machine.ended()
        self.look()

    def _heard(self, event: MachineEvent) -> None:
        if event.kind in (EventKind.PANICKED, EventKind.IO_ERROR, EventKind.RESET):
            log.warning("guest", vm=self.vm_id, what=event.kind.value, detail=event.detail)
        self.look()

    async def _run(self) -> None:
        await self._first_look()
        while True:
            # Cleared before looking at what there is to do: a wish that comes in meanwhile wakes us again.
            self._wake.clear()
            if self._waiting:
                await self._run_next()
                self.look()
            elif self._look:
                self._look = False
                await self._observe_safely()
            else:
                await self._wake.wait()

    async def _first_look(self) -> None:
        """After the daemon started: find the machine, unless an interrupted operation will see to that."""
        try:
            await self.attach()
        except MicaError as error:
            log.warning("a machine does not answer", vm=self.vm_id, error=error.message)
        self._look = True

    async def _observe_safely(self) -> None:
        try:
            await self._observe()
        except MicaError as error:
            log.warning("could not look at a machine", vm=self.vm_id, error=error.message)
        except Exception:  # the root of this task
            log.exception("could not look at a machine", vm=self.vm_id)

    async def _observe(self) -> None:
        row = await self._env.records.statuses.get(self.vm_id)
        if row is None:
            return
        status = row.value
        if status.observed.state not in LIVE:
            return
        gone = self._exit
        watched = self.machine is not None
        if gone is None and await self.attach() is None:
            runtime = status.runtime
            gone = await self._env.hypervisor.autopsy(runtime) if runtime else Exit(clean=False)
        if gone is not None:
            self._exit = None
            await settle(self._env, self.vm_id, gone, watched=watched)
            await self._on_settled(self.vm_id)
            return
        assert self.machine is not None
        try:
            seen = await self.machine.observe()
        except MicaError:
            # It may be dying: its end will wake us. A machine that lives and does not answer is told as it is.
            self._exit = self._exit or await self._ended_within(self.machine, DYING_S)
            if self._exit is not None:
                self.look()
                return
            raise
        if seen.run is RunState.SHUTDOWN:
            return  # its process is about to end, and then we settle
        state = VmState.RUNNING if seen.run is RunState.RUNNING else VmState.PAUSED
        await set_state(self._env, self.vm_id, lambda o: self._seen(o, state, seen.reason, seen.agent))

    def _seen(self, observed: VmObserved, state: VmState, reason: str, agent: AgentState) -> VmObserved:
        since = observed.since if observed.state is state else self._env.clock.now()
        return replace(observed, state=state, since=since, reason=reason, agent=agent)

    async def _ended_within(self, machine: Machine, seconds: float) -> Exit | None:
        try:
            async with within(self._env.clock, seconds):
                return await machine.ended()
        except TimeoutError:
            return None


def vm_verbs(operations: tuple[Operation, ...]) -> list[VmVerb]:
    return [VmVerb(o.verb) for o in operations]
