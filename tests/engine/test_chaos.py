"""Random lives: requests, guests with a will of their own, failing ports, daemons and hosts that die at any moment.

Whenever everything has come to rest, no state is lost and none lies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from structlog.testing import capture_logs

from mica.engine import forking
from mica.engine.definition import NoParams, Policy
from mica.engine.engine import Engine
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code, MicaError
from mica.model.image import MicroRecipe
from mica.model.operation import OperationState
from mica.model.snapshot import HISTORY, Snapshot
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import ImageMake, SnapshotRestore, VmCreate, VmDelete, VmFork, VmRestore, VmSet, VmStart, VmStop
from mica.model.vm import DiskSpec
from mica.testing.harness import BY, Life, Rig
from mica.testing.simulated import Behaviour
from mica.testing.store_faults import Crash, Fault, When, io_error

T = TypeVar("T")

# Long enough for every loop that corrects something and for the slowest guest; after a call that hung, for every
# deadline of a step too.
REST_S = 40.0
HUNG_S = 160.0

BEHAVIOURS = [
    Behaviour(agent_after_s=0.5),
    Behaviour(agent_after_s=None, obeys_after_s=5.0),
    Behaviour(obeys_after_s=None),
    Behaviour(power_off_after_s=10.0),
    Behaviour(killed_after_s=10.0),
]
DISK = DiskSpec(name="data", size=Bytes(GIB))

vms = st.integers(0, 5)
names = st.sampled_from(["a", "b", "c", "d"])


def _back(keep: bool) -> SnapshotRestore:
    return SnapshotRestore(keep=keep)


def _at(body: VmFork, snapshot: Snapshot) -> VmFork:
    return msgspec.structs.replace(body, snapshot=snapshot.id)


class Daemon:
    """One life in a task of its own, so that it can die while somebody asks it something."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._end = asyncio.Event()
        self._ready = asyncio.Event()
        self.life: Life | None = None
        self.task = asyncio.get_running_loop().create_task(self._live())

    async def _live(self) -> None:
        async with self._rig.life() as life:
            self.life = life
            self._ready.set()
            await self._end.wait()

    async def ready(self) -> Life | None:
        """The life, or ``None`` when it has died while it recovered."""
        waiting = asyncio.ensure_future(self._ready.wait())
        await asyncio.wait({waiting, self.task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return None if self.task.done() else self.life

    async def end(self, *, kill: bool = False) -> None:
        if kill and self.life is not None:
            self.life.store.crashed = True
        self._end.set()
        await self.task


class Chaos(RuleBasedStateMachine):
    """Rules are what may happen; what must hold is checked at rest."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = capture_logs()
        self.logs.__enter__()
        self.loop = asyncio.new_event_loop()
        self.rig = self.run(self._make())
        self.daemon: Daemon = self.run(self._begin())
        self.purged: set[str] = set()
        self.made: dict[str, str] = {}
        self.refusals: list[BaseException] = []
        self.hung = False

    async def _make(self) -> Rig:
        rig = Rig(Policy(trash_s=1e9, inbox_capacity=6), memory=6 * GIB)
        rig.world.add_image("micro")
        return rig

    async def _begin(self) -> Daemon:
        return Daemon(self.rig)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def _life(self) -> Life:
        """The present life; the next one where it has died."""
        while True:
            if self.daemon.task.done():
                await self.daemon.task
                self.daemon = Daemon(self.rig)
            life = await self.daemon.ready()
            if life is not None and not life.store.crashed:
                return life
            await self.daemon.end(kill=True)

    async def _vm(self, index: int) -> str:
        known = sorted(await self.rig.records.vms.scan())
        return known[index % len(known)] if known else "none"

    def ask(self, verb: str, index: int | None, params: msgspec.Struct) -> None:
        self.run(self._ask(verb, index, params))

    async def _ask(self, verb: str, index: int | None, params: msgspec.Struct) -> None:
        life = await self._life()
        target = "" if index is None else await self._vm(index)
        before = {o.id for o in await self._operations()}
        await self._patiently(life.submit(verb, target, params))
        # What was accepted counts although the daemon may have died before it could say so. Mica's own does not: an
        # autostart may have come in between.
        for operation in await self._operations():
            if operation.id not in before and operation.by == BY:
                self._note(operation.verb, operation.id, operation.target.partition("/")[2], params)

    def _note(self, verb: str, operation_id: str, vm_id: str, params: msgspec.Struct) -> None:
        if verb == "vm.purge":
            self.purged.add(vm_id)
        if isinstance(params, VmCreate):
            if params.ephemeral:
                self.purged.add(vm_id)
            self.made[operation_id] = vm_id

    async def _operations(self) -> list[Any]:
        return [r.value for r in (await self.rig.records.operations.scan()).values()]

    # ── what users do ─────────────────────────────────────────────────────────────────────────────────────────────

    @initialize(behaviours=st.tuples(*[st.sampled_from(BEHAVIOURS)] * 4))
    def guests(self, behaviours: tuple[Behaviour, ...]) -> None:
        for name, behaviour in zip("abcd", behaviours, strict=True):
            self.rig.world.behave(name, behaviour)

    @rule(name=names, start=st.booleans(), disk=st.booleans(), more=st.booleans(), memory=st.sampled_from([128, 2048]))
    def create(self, name: str, start: bool, disk: bool, more: bool, memory: int) -> None:
        body = VmCreate(
            name=name,
            image="micro",
            start=start,
            disks=(DISK,) if disk else (),
            ephemeral=more and start,
            autostart=more,
            memory=Bytes(memory * MIB),
        )
        self.ask("vm.create", None, body)

    @rule(vm=vms, paused=st.booleans())
    def start(self, vm: int, paused: bool) -> None:
        self.ask("vm.start", vm, VmStart(paused=paused))

    @rule(vm=vms, force=st.booleans())
    def stop(self, vm: int, force: bool) -> None:
        self.ask("vm.stop", vm, VmStop(force=force, timeout_s=8.0))

    @rule(vm=vms)
    def restart(self, vm: int) -> None:
        self.ask("vm.restart", vm, VmStop(timeout_s=3.0))

    @rule(vm=vms, verb=st.sampled_from(["vm.pause", "vm.resume", "vm.suspend", "vm.discard"]))
    def hold_or_release(self, vm: int, verb: str) -> None:
        self.ask(verb, vm, NoParams())

    @rule(vm=vms, name=names, memory=st.sampled_from([256, 1024, 4096]), rename=st.booleans())
    def set(self, vm: int, name: str, memory: int, rename: bool) -> None:
        memory_ = Bytes(memory * MIB)
        self.ask("vm.set", vm, VmSet(name=name, cpu_limit=0.5) if rename else VmSet(memory=memory_, labels={name: "1"}))

    @rule(vm=vms, force=st.booleans(), purge=st.booleans())
    def delete(self, vm: int, force: bool, purge: bool) -> None:
        self.ask("vm.purge" if purge else "vm.delete", vm, VmDelete(purge=purge, force=force))

    @rule(vm=vms, name=names)
    def restore(self, vm: int, name: str) -> None:
        self.ask("vm.restore", vm, VmRestore(name=name))

    @rule(vm=vms, memory=st.booleans())
    def snapshot(self, vm: int, memory: bool) -> None:
        self.ask("snapshot.create", vm, Take(memory=memory))

    @rule(index=st.integers(0, 3), keep=st.booleans())
    def go_back(self, index: int, keep: bool) -> None:
        self.run(self._with_snapshot(index, lambda e, s: forking.restore(e, s.vm_id, s.id, _back(keep), by=BY)))

    @rule(index=st.integers(0, 3))
    def delete_snapshot(self, index: int) -> None:
        self.run(self._with_snapshot(index, lambda e, s: e.submit("snapshot.delete", s.id, NoParams(), by=BY)))

    @rule(index=st.integers(0, 3), name=st.sampled_from(["f", "g"]))
    def fork_snapshot(self, index: int, name: str) -> None:
        body = VmFork(name=name)
        self.run(self._with_snapshot(index, lambda e, s: forking.fork(e, s.vm_id, _at(body, s), by=BY)))

    @rule(vm=vms, name=st.sampled_from(["f", "g"]), count=st.integers(1, 2))
    def fork(self, vm: int, name: str, count: int) -> None:
        self.run(self._fork(vm, VmFork(name=name, count=count)))

    async def _fork(self, index: int, body: VmFork) -> None:
        life, vm_id = await self._life(), await self._vm(index)
        await self._patiently(forking.fork(life.engine, vm_id, body, by=BY))

    async def _with_snapshot(self, index: int, do: Callable[[Engine, Snapshot], Coroutine[Any, Any, Any]]) -> None:
        life = await self._life()
        rows = await self.rig.records.snapshots.scan()
        known = sorted((r.value for r in rows.values() if r.value.kind in HISTORY), key=lambda s: s.id)
        if known:
            await self._patiently(do(life.engine, known[index % len(known)]))

    async def _patiently(self, asking: Coroutine[Any, Any, Any]) -> None:
        asked = asyncio.ensure_future(asking)
        await self._turns(30)
        while not asked.done():
            # A port hangs: then only time helps.
            await self.rig.clock.advance(10.0)
        error = asked.exception()
        if error is not None:
            self.refusals.append(error)

    @rule(verb=st.sampled_from(["image.make", "image.verify", "image.delete"]))
    def image(self, verb: str) -> None:
        self.run(self._image(verb))

    async def _image(self, verb: str) -> None:
        life = await self._life()
        try:
            if verb == "image.make":
                await life.submit(verb, "", ImageMake(MicroRecipe()))
            else:
                await life.submit(verb, "micro", NoParams())
        except (MicaError, Crash):
            pass

    @rule(index=st.integers(0, 3))
    def cancel(self, index: int) -> None:
        self.run(self._cancel(index))

    async def _cancel(self, index: int) -> None:
        life = await self._life()
        active = [o for o in await self._operations() if not o.state.ended]
        try:
            if active:
                await life.engine.cancel(active[index % len(active)].id, by=BY)
        except (MicaError, Crash):
            pass

    # ── what happens ──────────────────────────────────────────────────────────────────────────────────────────────

    @rule(index=vms, what=st.sampled_from(["power_off", "kill", "pause", "resume", "open_agent", "close_agent"]))
    def guest(self, index: int, what: str) -> None:
        self.run(self._guest(index, what))

    async def _guest(self, index: int, what: str) -> None:
        processes = sorted(self.rig.world.processes)
        if processes:
            getattr(self.rig.world.processes[processes[index % len(processes)]], what)()

    @rule(call=st.integers(1, 12), hang=st.booleans())
    def port_fails(self, call: int, hang: bool) -> None:
        if hang:
            self.hung = True
            self.rig.world.faults.hang("*", call=call)
        else:
            self.rig.world.faults.fail("*", call=call)

    @rule(commits=st.integers(1, 12), when=st.sampled_from(When), crash=st.booleans())
    def store_fails(self, commits: int, when: When, crash: bool) -> None:
        self.run(self._store_fails(commits, when, crash))

    async def _store_fails(self, commits: int, when: When, crash: bool) -> None:
        life = await self._life()
        at = life.store.commits + commits
        life.store.faults.append(Fault(at, when) if crash else Fault(at, When.BEFORE, io_error()))

    @rule()
    def daemon_is_killed(self) -> None:
        self.run(self.daemon.end(kill=True))

    @rule()
    def daemon_ends(self) -> None:
        self.run(self.daemon.end())

    @precondition(lambda self: self.rig.world.boots < 3)
    @rule()
    def host_reboots(self) -> None:
        self.run(self.daemon.end(kill=True))
        self.rig.world.reboot()

    @rule(turns=st.integers(1, 60))
    def some_turns(self, turns: int) -> None:
        self.run(self._turns(turns))

    async def _turns(self, turns: int) -> None:
        await self._life()
        for _ in range(turns):
            await asyncio.sleep(0)

    @rule(seconds=st.sampled_from([0.3, 1.0, 6.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(self._time_passes(seconds))

    async def _time_passes(self, seconds: float) -> None:
        await self._life()
        await self.rig.clock.advance(seconds)

    # ── what must hold ────────────────────────────────────────────────────────────────────────────────────────────

    async def _rest(self) -> None:
        self.rig.world.faults.clear()
        life = await self._life()
        life.store.faults.clear()
        for _ in range(4):
            await self.rig.clock.advance(HUNG_S if self.hung else REST_S)
            await life.rest()
            stuck = [o for o in await self._operations() if o.state is OperationState.STUCK]
            if not stuck:
                break
            for operation in stuck:
                await life.engine.resolve(operation.id, "retry", by=BY)
        # Guests that end by themselves may just have begun to; by now the last of them has been put away.
        await life.rest()
        found = await self.rig.lies()
        assert found == [], found
        await self._check_nothing_lost()

    async def _check_nothing_lost(self) -> None:
        there = set(await self.rig.records.vms.scan())
        operations = {o.id: o for o in await self._operations()}
        for operation_id, vm_id in self.made.items():
            made = operations[operation_id].state is OperationState.SUCCEEDED
            if made and vm_id not in self.purged:
                assert vm_id in there, f"VM {vm_id} was made and is lost"
            if not made:
                assert vm_id not in there, f"VM {vm_id} was not made and is there"
        problems = [o.problem for o in operations.values() if o.problem]
        problems += [e.problem() for e in self.refusals if isinstance(e, MicaError)]
        assert [p for p in problems if p.code is Code.INTERNAL and p != io_error().problem()] == []
        assert [e for e in self.refusals if not isinstance(e, MicaError | Crash)] == []

    def teardown(self) -> None:
        try:
            self.run(self._rest())
        finally:
            self.run(self.daemon.end())
            self.run(self.rig.__aexit__())
            self.loop.close()
            self.logs.__exit__(None, None, None)


Chaos.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Whoever finds something may look five minutes for the shortest way there (Hypothesis' own limit).
TestChaos = pytest.mark.timeout(900)(Chaos.TestCase)
