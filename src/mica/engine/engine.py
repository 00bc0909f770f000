"""The engine: accepts requests in one transaction, gives them to actors, and goes on where a daemon stopped."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
import structlog

from mica.engine.actor import HALFWAY, Actor, VmActor, requests
from mica.engine.deadline import within
from mica.engine.definition import Definition, Env, Ports, Proposal
from mica.engine.inbox import decide, expected_state
from mica.engine.reconcilers import make_loops
from mica.engine.reconcilers.trash import has_done_its_work
from mica.engine.records import MAX_ATTEMPTS, Claim, Draft, Versioned, contended
from mica.engine.registry import DEFINITIONS
from mica.engine.sampler import UsageSampler
from mica.engine.settle import NOT_FULLY
from mica.engine.views import Views
from mica.model.errors import Code, MicaError, not_found
from mica.model.operation import Actor as By
from mica.model.operation import Operation, OperationState
from mica.model.transitions import LIVE, Answer, VmVerb
from mica.model.units import format_duration
from mica.model.views import VmDelete, VmStart
from mica.model.vm import VmState
from mica.ports.hypervisor import Machine, StatefulMachine
from mica.ports.store import ABSENT, Conflict

log = structlog.get_logger()
replace = msgspec.structs.replace

# How long judging a request may take; asking QEMU for the first time what it can do is a part of that. Seconds.
PLAN_S = 120.0

ENGINE = By("mica", "engine")


class Engine:
    """One host's engine. Use :meth:`running`; every other method needs it to run.

    ``definitions`` are the verbs it knows, by name; ``new_id`` makes the ids of VMs and operations; ``on_ended`` is
    told of each operation that has ended.
    """

    def __init__(
        self,
        ports: Ports,
        definitions: Mapping[str, Definition] = DEFINITIONS,
        new_id: Callable[[], uuid.UUID] = uuid.uuid4,
        on_ended: Callable[[Operation], None] = lambda _: None,
    ) -> None:
        self._definitions = definitions
        self._new_id = new_id
        self.sampler = UsageSampler(ports)
        self.env = Env(**vars(ports), machines=self, sampler=self.sampler, on_ended=on_ended)
        self.views = Views(self.env, self)
        self.loops = make_loops(self.env, self)
        self._vms: dict[str, VmActor] = {}
        self._others: dict[str, Actor] = {}
        self._group: asyncio.TaskGroup | None = None

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        """Recover, then serve until the block ends. Ending is the same as being killed, only tidier."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            loops: list[asyncio.Task[None]] = []
            try:
                await self._recover()
                loops = [group.create_task(loop.run(), name=loop.name) for loop in self.loops]
                yield self
            finally:
                for task in loops:
                    task.cancel()
                actors = [*self._vms.values(), *self._others.values()]
                await asyncio.gather(*(actor.stop() for actor in actors))
                self._vms.clear()
                self._others.clear()

    async def _recover(self) -> None:
        """Give every VM its actor and every unfinished operation to the actor of its target, oldest first."""
        records = self.env.records
        rows = (await records.operations.scan()).values()
        for row in rows:
            if row.value.state is OperationState.STUCK:
                self._actor(_home(row.value)).stuck = row.value
        unfinished = [o for o in rows if _active(o.value)]
        for row in sorted(unfinished, key=_order):
            self._actor(_home(row.value)).enqueue(row.value)
        for vm_id, status in (await records.statuses.scan()).items():
            if status.value.runtime is not None:
                self.env.ram.learn(status.value.runtime)  # before a copy of it looks for its memory
            if status.value.observed.state in LIVE | HALFWAY:
                self._actor(f"vm/{vm_id}")
        for actor in [*self._vms.values(), *self._others.values()]:
            actor.start()

    def _actor(self, target: str, *, start: bool = False) -> Actor:
        noun, _, id_ = target.partition("/")
        assert self._group is not None
        known: Actor | None = self._vms.get(id_) if noun == "vm" else self._others.get(target)
        if known is None:
            if noun == "vm":
                known = self._vms[id_] = VmActor(self.env, self._definitions, id_, self._group, self._settled)
            else:
                known = self._others[target] = Actor(self.env, self._definitions, target, self._group)
            if start:
                known.start()
        return known

    def look_at_all(self) -> None:
        for actor in self._vms.values():
            actor.look()

    async def retire_idle(self) -> None:
        """Actors are cheap but not free: let those go that have no machine and nothing to do."""
        for vm_id, actor in list(self._vms.items()):
            if actor.at_rest():
                status = await self.env.records.statuses.get(vm_id)
                down = status is None or status.value.observed.state not in LIVE
                if down and actor.at_rest():
                    self._vms.pop(vm_id, None)
                    await actor.stop()
        for target, other in list(self._others.items()):
            if other.at_rest():
                self._others.pop(target, None)
                await other.stop()

    async def _settled(self, vm_id: str) -> None:
        """A VM's process ended by itself. An ephemeral one has then done its work."""
        vm, status = await self.env.records.vms.get(vm_id), await self.env.records.statuses.get(vm_id)
        if vm is not None and status is not None and has_done_its_work(vm.value, status.value.observed):
            # If this is lost with the daemon, or refused, the reconciler of the trash does the same.
            await self.submit("vm.purge", vm_id, VmDelete(purge=True), by=ENGINE)

    # ── machines, for the steps of operations ─────────────────────────────────────────────────────────────────────

    def machine(self, vm_id: str) -> Machine | None:
        actor = self._vms.get(vm_id)
        return actor.machine if actor else None

    async def attach(self, vm_id: str) -> StatefulMachine | None:
        actor = self._vms.get(vm_id)
        return await actor.attach() if actor else None

    def waiting(self, vm_id: str) -> tuple[Operation, ...]:
        """Operations on a VM that were accepted and have not ended, the running one first."""
        actor = self._vms.get(vm_id)
        return actor.waiting if actor else ()

    def live(self) -> list[str]:
        """Ids of the VMs whose machine is attached."""
        return [vm_id for vm_id, actor in self._vms.items() if actor.machine is not None]

    def detach(self, vm_id: str) -> None:
        actor = self._vms.get(vm_id)
        if actor is not None:
            actor.detach()

    async def ended(self, vm_id: str) -> bool:
        actor = self._vms.get(vm_id)
        return await actor.ended() if actor else True

    def wanted(self, vm_id: str, *, but: str = "") -> bool:
        up = (VmVerb.START, VmVerb.RESTART)
        return any(
            (o.verb in up or (o.verb == VmVerb.REVERT and o.params.get("start"))) and o.id != but
            for o in self.waiting(vm_id)
        )

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def submit(
        self,
        verb: str,
        target: str,
        params: msgspec.Struct,
        *,
        by: By,
        if_match: int | None = None,
        idempotency_key: str = "",
    ) -> Operation:
        """Accept a request durably and return its operation; it may have ended already when nothing was to be done.

        ``if_match`` is the generation that the target must have. The same ``idempotency_key`` of the same requester
        returns the first operation again. Raises every code that refuses a request; then nothing was written.
        """
        definition = self._definitions.get(verb)
        if definition is None:
            raise not_found("verb", verb)
        if definition.noun == "vm" and not definition.creates:
            target = await self.env.records.resolve_vm(target, trashed=verb == VmVerb.RESTORE)
        elif definition.creates:
            target = str(self._new_id())
        digest = hashlib.sha256(msgspec.json.encode([verb, target if not definition.creates else "", params]))
        if verb == VmVerb.RESUME and await self._sleeps(target):
            definition, params = self._definitions[VmVerb.START], VmStart()
        key = f"{by.name}:{idempotency_key}" if idempotency_key else ""
        actor = self._actor(f"{definition.noun}/{target}", start=True)
        async with actor.lock:
            for _ in range(MAX_ATTEMPTS):
                if key and (known := await self._known(key, digest.hexdigest())):
                    return known
                try:
                    operation = await self._accept(
                        definition, target, params, by, if_match, (key, digest.hexdigest()), actor
                    )
                except Conflict:
                    continue
                if not operation.state.ended:
                    self._actor(_home(operation), start=True).enqueue(operation)
                return operation
        raise contended(definition.noun, target)

    async def _sleeps(self, vm_id: str) -> bool:
        """Whether the VM will be suspended when a request's turn comes: going on is a start then."""
        status = await self.env.records.statuses.get(vm_id)
        state = status.value.observed.state if status is not None else VmState.GONE
        return expected_state(state, requests(self.waiting(vm_id))) is VmState.SUSPENDED

    async def _known(self, key: str, digest: str) -> Operation | None:
        claim = await self.env.records.keys.get(key)
        if claim is None:
            return None
        if claim.value.note != digest:
            raise MicaError(
                Code.INVALID,
                "that Idempotency-Key was used for another request",
                hint="use a new key for each request, and the same one only to repeat it",
            )
        operation = await self.env.records.operations.get(claim.value.holder)
        if operation is None:
            raise MicaError(
                Code.GONE,
                "the operation of that Idempotency-Key is no longer kept",
                hint="look at what is there, and use a new key if it is still to be done",
            )
        return operation.value

    async def _accept(
        self,
        definition: Definition,
        target: str,
        params: msgspec.Struct,
        by: By,
        if_match: int | None,
        key: tuple[str, str],
        actor: Actor,
    ) -> Operation:
        """One attempt to accept. Raises :class:`Conflict` when a row changed underneath."""
        env, draft = self.env, Draft()
        proposal = Proposal(env, params, by, draft, target)
        answer = Answer.ACCEPT
        if (blocked := actor.blocked()) is not None:
            raise blocked
        if definition.noun == "vm" and not definition.creates:
            proposal.vm = await env.records.vms.need(target)
            proposal.status = await env.records.statuses.need(target)
            proposal.target_name = proposal.vm.value.name
            _check_generation(proposal.target_name, proposal.vm.generation, if_match)
            assert definition.state_verb is not None
            decision = decide(
                proposal.target_name,
                proposal.status.value.observed.state,
                requests(actor.waiting),
                definition.state_verb,
                capacity=env.policy.inbox_capacity,
                stops_first=isinstance(params, VmDelete) and params.force,
            )
            if decision.error is not None:
                raise decision.error
            answer, proposal.expected = decision.answer, decision.expected
        if answer is Answer.ACCEPT:
            try:
                async with within(env.clock, PLAN_S):
                    await definition.plan(proposal)
            except TimeoutError as error:
                raise MicaError(
                    Code.TIMEOUT,
                    f"this host did not say within {format_duration(PLAN_S)} whether that is possible",
                    hint="`mica doctor` shows what does not answer",
                    retryable=True,
                ) from error
        now = env.clock.now()
        operation = Operation(
            id=str(self._new_id()),
            verb=definition.verb,
            target=f"{definition.noun}/{proposal.target_id}",
            target_name=proposal.target_name,
            params={**msgspec.to_builtins(params), **proposal.stored_params},
            by=by,
            created_at=now,
        )
        self._check_queue(definition, operation)
        if answer is Answer.IGNORE:
            operation = replace(
                operation, state=OperationState.SUCCEEDED, started_at=now, ended_at=now, result={"already": True}
            )
        draft.put(env.records.operations, operation.id, operation, ABSENT)
        if key[0]:
            draft.put(env.records.keys, key[0], Claim(operation.id, key[1], now), ABSENT)
        await env.records.commit(draft)
        if operation.state.ended:
            env.on_ended(operation)
        return operation

    def _check_queue(self, definition: Definition, operation: Operation) -> None:
        """Nothing queues without bound. VMs have asked their inbox; for images, builds together count as one queue."""
        if definition.noun == "vm":
            return
        home = self._others.get(_home(operation))
        if home is not None and (blocked := home.blocked()) is not None:
            raise blocked
        queues = list(self._others.values()) if definition.creates else [home] if home else []
        waiting = sum(len(queue.waiting) for queue in queues)
        if waiting >= self.env.policy.inbox_capacity:
            raise MicaError(
                Code.BUSY,
                f"{waiting} operations on {definition.noun}s are waiting already",
                hint="wait for some of them: `mica operation list`",
                retryable=True,
            )

    async def cancel(self, operation_id: str, *, by: By) -> Operation:
        """Ask an operation to stop and undo what it did. Raises ``state-conflict`` when it has ended already."""
        found = (await self.env.records.operations.need(operation_id)).value
        if found.state.ended or found.state is OperationState.STUCK:
            raise MicaError(
                Code.STATE_CONFLICT, f"operation {operation_id[:8]} has {found.state} already", hint="nothing to cancel"
            )
        log.info("cancel", operation=operation_id, by=by.name)
        written = await self.env.records.operations.update(
            operation_id, lambda o: o if o.state.ended else replace(o, cancel_requested=True)
        )
        self._actor(_home(found), start=True).cancel(operation_id)
        return written.value

    async def resolve(self, operation_id: str, how: str, *, by: By) -> Operation:
        """An operator's word on a stuck operation: ``retry`` the undo, or ``accept`` what is left as it is."""
        if how not in ("retry", "accept"):
            raise MicaError(Code.INVALID, f"a stuck operation cannot be resolved by {how!r}", hint="retry or accept")
        log.info("resolve", operation=operation_id, how=how, by=by.name)

        def change(operation: Operation) -> Operation:
            if operation.state is not OperationState.STUCK:
                raise MicaError(Code.STATE_CONFLICT, f"operation {operation_id[:8]} is {operation.state}, not stuck")
            if how == "accept":
                return replace(operation, state=OperationState.FAILED, ended_at=self.env.clock.now())
            # Without its failed undo the journal says that this undo has begun: the runner begins it again.
            kept = tuple(e for e in operation.journal if e.event != "undo-failed")
            return replace(operation, state=OperationState.UNWINDING, journal=kept)

        operation = (await self.env.records.operations.update(operation_id, change)).value
        actor = self._actor(_home(operation), start=True)
        actor.stuck = None
        if how == "retry":
            actor.enqueue(operation)
            return operation
        self.env.on_ended(operation)
        if isinstance(actor, VmActor):
            await self._mark_unfinished(actor.vm_id, operation)
            actor.look()
        return operation

    async def _mark_unfinished(self, vm_id: str, operation: Operation) -> None:
        """Whoever looks at the VM sees that something was left of it."""
        reason = f"{NOT_FULLY} undone: {operation.verb}"
        if await self.env.records.statuses.get(vm_id) is not None:
            await self.env.records.statuses.update(
                vm_id, lambda s: replace(s, observed=replace(s.observed, reason=reason, problem=operation.problem))
            )


def _active(operation: Operation) -> bool:
    return not operation.state.ended and operation.state is not OperationState.STUCK


def _home(operation: Operation) -> str:
    """Whose queue an operation is in. Images have one for each name: what makes, checks and deletes must not cross."""
    return f"image/{operation.target_name}" if operation.target.startswith("image/") else operation.target


def _order(row: Versioned[Operation]) -> tuple[bool, float, int]:
    """Those that run first, then by age. Of the same moment, the one that was written first was accepted first."""
    return (row.value.state is OperationState.QUEUED, row.value.created_at, row.generation)


def _check_generation(name: str, generation: int, if_match: int | None) -> None:
    if if_match is not None and if_match != generation:
        raise MicaError(
            Code.GENERATION_CONFLICT,
            f"VM {name} has generation {generation}, not {if_match}",
            hint="somebody changed it: read it again and decide anew",
            details={"generation": generation, "if_match": if_match},
        )
