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
from mica.engine.inbox import Pending, pending
from mica.engine.journal import IllegalJournal
from mica.engine.saga import Canceller, Runner
from mica.engine.settle import NOT_DELETED, moved, never_ran, set_state, settle
from mica.model.errors import Code, MicaError, Problem
from mica.model.operation import Operation, OperationState
from mica.model.transitions import LIVE, VmVerb
from mica.model.vm import AgentState, VmObserved, VmRuntime, VmState
from mica.ports.hypervisor import EventKind, Exit, MachineEvent, RunState, StatefulMachine

log = structlog.get_logger()
replace = msgspec.structs.replace

# States in which only an operation can leave a VM.
HALFWAY = frozenset({VmState.CREATING, VmState.DELETING})

# Between the last word of a dying QEMU's monitor and the end of its process. Seconds.
DYING_S = 2.0

# How long looking at a machine may take, and putting away what is left of one that has ended. Seconds.
LOOK_S = 120.0

# Longest pause between two attempts to go on with an operation while the store fails. Seconds.
MAX_PAUSE_S = 30.0


class Waiting:
    """An accepted operation in an inbox, with the wish to cancel it. ``begun``: it has run already."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.begun = operation.state is not OperationState.QUEUED
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
        self._failures = 0
        self.stuck: Operation | None = None
        self.lock = asyncio.Lock()

    def start(self) -> None:
        self._task = self._group.create_task(self._run(), name=f"actor {self.target}")

    async def stop(self) -> None:
        """Stop where it stands: what is under way goes on with the next daemon."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def at_rest(self) -> bool:
        """Nobody would miss this actor: it has nothing to do and nobody is giving it anything."""
        return not self._waiting and not self.lock.locked() and self.stuck is None

    @property
    def waiting(self) -> tuple[Operation, ...]:
        """Accepted and not ended, oldest (the running one) first."""
        return tuple(w.operation for w in self._waiting)

    def blocked(self) -> MicaError | None:
        """Why nothing new may begin: taking back a stuck operation later would hit what was done since."""
        if self.stuck is None:
            return None
        noun, id_ = self.target.partition("/")[0], self.stuck.id
        return MicaError(
            Code.STUCK,
            f"{noun} {self.stuck.target_name} waits for an operator: its {self.stuck.verb} is stuck",
            hint=f"`mica operation resolve {id_[:8]} retry` tries again to take it back, `accept` leaves it as it is",
            details={"operation": id_},
        )

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
        """Run the first in the inbox to its end. While the store fails try again: what was accepted is not lost."""
        first = self._waiting[0]
        try:
            first.operation = (await self._env.records.operations.need(first.operation.id)).value
            if not first.operation.state.ended and first.operation.state is not OperationState.STUCK:
                definition = self._definitions.get(first.operation.verb)
                if definition is None:
                    raise IllegalJournal(f"this Mica has no verb {first.operation.verb}")
                blocked = None if first.begun else self.blocked()
                first.begun = True
                self._note(await Runner(self._env, definition, first.operation, first.canceller, blocked).run())
        except IllegalJournal as error:
            log.exception("operation cannot be followed", operation=first.operation.id)
            await self._give_up(first.operation, str(error))
        except Exception:  # the root of this task: one broken operation must not end the actor
            log.exception("operation could not be run", operation=first.operation.id)
            self._failures += 1
            await self._env.clock.sleep(min(2.0**self._failures, MAX_PAUSE_S))
            return
        self._failures = 0
        self._waiting.popleft()

    def _note(self, ended: Operation) -> None:
        if ended.state is OperationState.STUCK:
            self.stuck = ended
        elif self.stuck is not None and self.stuck.id == ended.id:
            self.stuck = None

    async def _give_up(self, operation: Operation, why: str) -> None:
        """No journal to go by: an operator decides. If not even that can be written, the next daemon tries again."""
        problem = Problem(Code.INTERNAL, f"the operation cannot be followed: {why}", hint="resolve it with `accept`")
        try:
            written = await self._env.records.operations.update(
                operation.id, lambda o: replace(o, state=OperationState.STUCK, problem=problem)
            )
            self._note(written.value)
        except MicaError:
            log.exception("operation could not be marked as stuck", operation=operation.id)


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
        self.machine: StatefulMachine | None = None
        self._on_settled = on_settled
        self._listener: asyncio.Task[None] | None = None
        self._look = False
        self._looking = False
        self._exit: Exit | None = None
        self._told: AgentState | None = None

    async def attach(self) -> StatefulMachine | None:
        """Connect by the recorded runtime; ``None`` when there is none or its process is gone."""
        if self.machine is not None:
            return self.machine if self._exit is None else None
        status = await self._env.records.statuses.get(self.vm_id)
        if status is None or status.value.runtime is None:
            return None
        self.machine = await self._env.hypervisor.attach(status.value.runtime)
        if self.machine is not None:
            self._exit = None
            self._told = None
            self._listener = self._group.create_task(self._listen(self.machine), name=f"events {self.vm_id}")
        return self.machine

    async def ended(self) -> bool:
        """Whether there is no process any more. One that is just dying gets a moment for it."""
        try:
            if self.machine is None:
                return await self.attach() is None
            self._exit = self._exit or await self._ended_within(self.machine, DYING_S)
        except MicaError:
            return False  # it does not answer, so it is there
        return self._exit is not None

    def detach(self) -> None:
        self.machine = None
        self._exit = None
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None

    async def stop(self) -> None:
        # In this order: an operation that is still under way may attach a machine, and so begin to listen.
        await super().stop()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait({self._listener})

    def look(self) -> None:
        """Something may have changed: look at the machine when no operation has it."""
        self._look = True
        self._wake.set()

    async def _listen(self, machine: StatefulMachine) -> None:
        try:
            async for event in machine.events():
                self._heard(event)
        except Exception:  # the root of this task; looking now and then goes on
            log.exception("lost sight of a machine", vm=self.vm_id)
        try:
            self._exit = await machine.ended()
        except Exception:
            log.exception("cannot wait for the end of a machine", vm=self.vm_id)
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
            if self._look and not self._begun:
                self._look = False
                await self._observe_safely()
            elif self._waiting:
                await self._run_next()
                self.look()
            else:
                await self._wake.wait()

    @property
    def _begun(self) -> bool:
        """The first operation is under way, though not running just now: it alone moves the observed state."""
        return bool(self._waiting) and self._waiting[0].begun

    async def _first_look(self) -> None:
        """After the daemon started: find the machine, unless an interrupted operation will see to that."""
        try:
            async with within(self._env.clock, LOOK_S):
                await self.attach()
        except (MicaError, TimeoutError) as error:
            log.warning("a machine does not answer", vm=self.vm_id, error=str(error))
        except Exception:  # the root of this task
            log.exception("a machine does not answer", vm=self.vm_id)
        self._look = True

    def at_rest(self) -> bool:
        return super().at_rest() and self.machine is None and not self._look and not self._looking

    async def _observe_safely(self) -> None:
        self._looking = True
        try:
            async with within(self._env.clock, LOOK_S):
                await self._observe()
        except (MicaError, TimeoutError) as error:
            log.warning("could not look at a machine", vm=self.vm_id, error=str(error))
        except Exception:  # the root of this task
            log.exception("could not look at a machine", vm=self.vm_id)
        finally:
            self._looking = False

    async def _observe(self) -> None:
        row = await self._env.records.statuses.get(self.vm_id)
        if row is None:
            return
        status = row.value
        if status.observed.state in HALFWAY:
            await self._leave_halfway()
        if status.observed.state not in LIVE:
            return
        if status.runtime is None:
            await never_ran(self._env, self.vm_id)
            return
        gone = self._exit
        watched = self.machine is not None
        if gone is None and await self.attach() is None:
            gone = await self._env.hypervisor.autopsy(status.runtime)
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
        if seen.run is RunState.RUNNING:
            # One that stands still answers nobody, and would find what it was asked meanwhile when it goes on. And
            # QEMU knows of the port of one that was copied only when its vCPUs run.
            self._tell_guests(status.runtime, seen.agent)
        state = VmState.RUNNING if seen.run is RunState.RUNNING else VmState.PAUSED
        await set_state(self._env, self.vm_id, lambda o: self._seen(o, state, seen.reason, seen.agent))

    async def _leave_halfway(self) -> None:
        """Made or deleted in part, and no operation is left that would go on: an operator has accepted that."""
        records = self._env.records
        rows = (await records.operations.scan()).values()
        if any(o.value.target == self.target and not o.value.state.ended for o in rows):
            return

        def left(observed: VmObserved) -> VmObserved:
            if observed.state is VmState.CREATING:
                return moved(self._env, observed, VmState.STOPPED, "not fully created")
            if observed.state is VmState.DELETING:
                return moved(self._env, observed, VmState.DELETING, NOT_DELETED, observed.problem)
            return observed

        await set_state(self._env, self.vm_id, left)

    def _tell_guests(self, runtime: VmRuntime, agent: AgentState) -> None:
        """Whoever waits for the agent's port hears of it at once."""
        if agent is not self._told:
            self._env.guests.port_changed(self.vm_id, runtime, opened=agent is AgentState.READY)
            self._told = agent

    def _seen(self, observed: VmObserved, state: VmState, reason: str, agent: AgentState) -> VmObserved:
        since = observed.since if observed.state is state else self._env.clock.now()
        if state is VmState.PAUSED and observed.state is state:
            reason = reason or observed.reason  # whoever had it paused said why
        return replace(observed, state=state, since=since, reason=reason, agent=agent)

    async def _ended_within(self, machine: StatefulMachine, seconds: float) -> Exit | None:
        try:
            async with within(self._env.clock, seconds):
                return await machine.ended()
        except TimeoutError:
            return None


def requests(operations: tuple[Operation, ...]) -> list[Pending]:
    """What an inbox holds, as the policy sees it."""
    return [
        pending(
            VmVerb(o.verb),
            paused=bool(o.params.get("paused") or o.params.get("held")),
            start=bool(o.params.get("start")),
        )
        for o in operations
    ]
