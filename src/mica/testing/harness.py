"""Lives of an engine over one simulated host: start it, kill it anywhere, start it again, and see what is true.

    async with Rig() as rig:
        async with rig.life() as life:
            operation = await life.submit("vm.create", "", VmCreate(name="a", image="micro"))
            await life.finish(operation.id)
        assert await rig.lies() == []

Time is the rig's own: it goes on only when nothing else can. A :class:`Crash`, from the store or from a hook, ends a
life and nothing more; the next one finds world and store as they were at that moment.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

import msgspec

from mica.engine.definition import Context, Definition, Policy, Step
from mica.engine.engine import Engine
from mica.engine.records import Records
from mica.engine.registry import DEFINITIONS
from mica.model.operation import Actor, Operation, OperationState
from mica.store.memory import MemoryStore
from mica.testing.clock import VirtualClock, idle
from mica.testing.simulated import SimulatedHost, simulated_ports
from mica.testing.simulated_truth import lies
from mica.testing.snapshot_truth import litter
from mica.testing.store_faults import Crash, Fault, FaultyStore

BY = Actor("tester", "test")

# Turns of the event loop without a store or port being called: then everything waits for time.
_QUIET_TURNS = 20
_TOO_LONG_S = 10_000.0

Hook = Callable[[str, Context], Awaitable[None]]


class StalledError(AssertionError):
    """What was waited for did not come, however much time went by."""


class Life:
    """One run of the daemon's engine."""

    def __init__(self, rig: Rig, store: CountingStore, engine: Engine) -> None:
        self.rig = rig
        self.store = store
        self.engine = engine
        self.records = engine.env.records

    async def submit(self, verb: str, target: str, params: msgspec.Struct, **how: Any) -> Operation:
        return await self.engine.submit(verb, target, params, by=how.pop("by", BY), **how)

    async def run(self, verb: str, target: str, params: msgspec.Struct, **how: Any) -> Operation:
        """Submit and wait for its end."""
        return await self.finish((await self.submit(verb, target, params, **how)).id)

    async def finish(self, operation_id: str) -> Operation:
        """The operation once it has ended or is stuck, and the engine has come to rest."""

        async def over() -> bool:
            state = (await self.records.operations.need(operation_id)).value.state
            return state.ended or state is OperationState.STUCK

        await self.until(over)
        await self.rest()
        return (await self.records.operations.need(operation_id)).value

    async def rest(self) -> None:
        """Let everything that is under way come to its end. Raises :class:`StalledError`."""

        async def idle() -> bool:
            rows = await self.records.operations.scan()
            return all(r.value.state.ended or r.value.state is OperationState.STUCK for r in rows.values())

        await self.until(idle)
        await self.quiet()

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Time goes on, to the next moment at which anybody wakes, only while nothing else happens."""
        clock = self.rig.clock
        limit = clock.monotonic() + _TOO_LONG_S
        await self.quiet()
        while not await condition():
            if clock.next_wake is None or clock.monotonic() > limit:
                raise StalledError("nothing happens any more")
            # Whoever wakes gets many turns before this returns.
            await clock.advance(max(0.0, clock.next_wake - clock.monotonic()))

    async def quiet(self) -> None:
        """Let everybody go on who needs no time for that."""
        calm, seen = 0, -1
        while calm < _QUIET_TURNS:
            await asyncio.sleep(0)
            if idle():
                return
            now = self.store.calls + self.rig.world.faults.calls.total()
            calm, seen = (calm + 1, seen) if now == seen else (0, now)

    async def advance(self, seconds: float) -> None:
        await self.quiet()
        await self.rig.clock.advance(seconds)
        await self.quiet()

    async def reap(self) -> None:
        """The reaper of parts comes round now."""
        await self.quiet()
        for loop in self.engine.loops:
            if loop.name == "parts":
                await loop.once()
        await self.quiet()


class CountingStore(FaultyStore):
    """Knows whether anybody has called it."""

    def __init__(self, inner: MemoryStore, faults: Iterable[Fault]) -> None:
        super().__init__(inner, faults)
        self.calls = 0

    def _check_alive(self) -> None:
        self.calls += 1
        super()._check_alive()


class Rig:
    """A world, a store and a clock that outlive the engines. ``ended``: the operations whose end an engine told of."""

    def __init__(self, policy: Policy | None = None, **world: Any) -> None:
        self.clock = VirtualClock()
        self.world = SimulatedHost(self.clock, **world)
        self.store = MemoryStore()
        self.records = Records(self.store)
        self.policy = policy
        self.crashes = 0
        self.ended: list[Operation] = []
        self._ids = itertools.count()

    def _new_id(self) -> uuid.UUID:
        """The same ids in the same order in each run, so that what a test has found it finds again."""
        return uuid.uuid5(uuid.NAMESPACE_OID, str(next(self._ids)))

    async def __aenter__(self) -> Rig:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.world.close()
        await self.store.close()

    @asynccontextmanager
    async def life(
        self, *, faults: Iterable[Fault] = (), definitions: Mapping[str, Definition] = DEFINITIONS
    ) -> AsyncIterator[Life]:
        """An engine until the block ends or a :class:`Crash` ends it, which is counted in ``crashes`` and no error."""
        store = CountingStore(self.store, faults)
        ports = simulated_ports(self.world, Records(store), self.policy)
        engine = Engine(ports, definitions, self._new_id, self.ended.append)
        try:
            async with engine.running():
                yield Life(self, store, engine)
        except* Crash:
            self.crashes += 1

    async def lies(self, *, stuck: bool = False, leftovers: bool = False) -> list[str]:
        return await lies(self.world, self.records, stuck=stuck, leftovers=leftovers)

    async def litter(self) -> list[str]:
        """What is there for nobody although the reaper has just come round, in words."""
        if await litter(self.world, self.records):
            async with self.life() as life:
                await life.reap()
        return await litter(self.world, self.records)

    async def snapshot(self) -> dict[str, Any]:
        """World and store as far as a request that comes to nothing must leave them as they were."""
        records = self.records
        held = self.world.holdings()
        return {
            **held,
            # Those of a VM that is there say what happened to it.
            "logs": sorted(set(held["logs"]) - (await records.vms.scan()).keys()),
            "vms": {i: _timeless_vm(r.value) for i, r in (await records.vms.scan()).items()},
            "states": {i: r.value.observed.state for i, r in (await records.statuses.scan()).items()},
            "names": {i: r.value.holder for i, r in (await records.names.scan()).items()},
            "slots": {i: r.value.holder for i, r in (await records.slots.scan()).items()},
            "image rows": {i: (r.value.image, r.value.damaged) for i, r in (await records.images.scan()).items()},
            "schedules": {i: r.value.keep for i, r in (await records.schedules.scan()).items()},
            "snapshots": {i: r.value for i, r in (await records.snapshots.scan()).items()},
            "standbys": {i: r.value.template for i, r in (await records.standbys.scan()).items()},
            "part rows": sorted(await records.parts.scan()),
            "promises": (await records.read_ledger()).value.reserved,
        }


def _timeless_vm(vm: msgspec.Struct) -> dict[str, Any]:
    """A VM's row without what a request changes by having been made: the intent."""
    return {f: getattr(vm, f) for f in vm.__struct_fields__ if f != "intent"}


@dataclass
class Hooks:
    """What is done around the steps of a verb; each is given the step's name and its context."""

    before_do: Hook | None = None
    after_do: Hook | None = None
    before_undo: Hook | None = None
    after_undo: Hook | None = None


def instrument(verb: str, hooks: Hooks) -> dict[str, Definition]:
    """Every definition, ``verb`` with hooks around its steps."""
    definition = DEFINITIONS[verb]

    def steps(operation: Operation) -> Sequence[Step]:
        return [_hooked(step, hooks) for step in definition.steps(operation)]

    return {**DEFINITIONS, verb: with_fields(definition, steps=steps)}


def _hooked(step: Step, hooks: Hooks) -> Step:
    undo = step.undo

    async def hooked_do(context: Context) -> Any:
        if hooks.before_do:
            await hooks.before_do(step.name, context)
        output = await step.do(context)
        if hooks.after_do:
            await hooks.after_do(step.name, context)
        return output

    async def hooked_undo(context: Context) -> None:
        assert undo is not None
        if hooks.before_undo:
            await hooks.before_undo(step.name, context)
        await undo(context)
        if hooks.after_undo:
            await hooks.after_undo(step.name, context)

    return with_fields(step, do=hooked_do, undo=hooked_undo if undo else None)
