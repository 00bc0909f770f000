"""For every verb: how to set up a world in which it has something to do, what is asked, and what is true afterwards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.image import DebianRecipe, MicroRecipe
from mica.model.operation import OperationState
from mica.model.schedule import ScheduleCreate, format_keep
from mica.model.snapshot import SnapshotKind
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import ImageMake, VmCreate, VmDelete, VmRestore, VmSet, VmStart, VmStop
from mica.model.vm import DiskSpec, IoLimits, VmState
from mica.ports.hypervisor import RunState
from mica.testing.harness import Life, Rig
from mica.testing.simulated import Behaviour

S = VmState
DISK = DiskSpec(name="data", size=Bytes(GIB))
GONE = "gone"


@dataclass(frozen=True)
class Scenario:
    """``prepare`` sets the world up and returns the target. ``check`` looks at a success. ``params`` may depend on
    what there is by then.

    ``restores``: a request that fails or is cancelled leaves everything as it was. Otherwise the VM may then be in
    one of the states ``otherwise``. ``until``: everything is restored only as long as that step has not begun.
    ``attached``: it is asked once the daemon has found its machines.
    """

    name: str
    verb: str
    params: msgspec.Struct | Callable[[Life], Awaitable[msgspec.Struct]]
    prepare: Callable[[Life], Awaitable[str]]
    check: Callable[[Rig], Awaitable[None]]
    restores: bool = True
    otherwise: frozenset[VmState] = field(default_factory=frozenset)
    until: str = ""
    attached: bool = False

    def __str__(self) -> str:
        return self.name

    async def asks(self, life: Life) -> msgspec.Struct:
        """What is asked, now that it is prepared."""
        return self.params if isinstance(self.params, msgspec.Struct) else await self.params(life)


async def _image(life: Life) -> str:
    operation = await life.run("image.make", "", ImageMake(MicroRecipe()))
    assert operation.state is OperationState.SUCCEEDED, operation.problem
    return "micro"


async def done(life: Life, verb: str, target: str, params: msgspec.Struct) -> None:
    operation = await life.run(verb, target, params)
    assert operation.state is OperationState.SUCCEEDED, operation.problem


async def _nothing(life: Life) -> str:
    await _image(life)
    return ""


async def _stopped(life: Life) -> str:
    await _image(life)
    await done(life, "vm.create", "", VmCreate(name="a", image="micro", disks=(DISK,)))
    return "a"


async def _running(life: Life) -> str:
    if not life.rig.world.behaviours:
        life.rig.world.behave("a", Behaviour(agent_after_s=0.2))
    await _stopped(life)
    await done(life, "vm.start", "a", VmStart())
    await life.advance(1.0)
    return "a"


async def _deaf(life: Life) -> str:
    life.rig.world.behave("a", Behaviour(agent_after_s=None, obeys_after_s=None))
    return await _running(life)


async def _paused(life: Life) -> str:
    await _running(life)
    await done(life, "vm.pause", "a", NoParams())
    return "a"


async def _suspended(life: Life) -> str:
    await _running(life)
    life.rig.world.process("a").memory.append("kept")
    await done(life, "vm.suspend", "a", NoParams())
    return "a"


async def _moment(life: Life) -> str:
    """The id of a snapshot of a stopped VM that had written to its disk."""
    await _stopped(life)
    volumes = next(iter(life.rig.world.volumes.values()))
    life.rig.world.storage.there[volumes["data"].path].write("written")
    operation = await life.run("snapshot.create", "a", Take(name="one"))
    return str(operation.result["id"])


async def _crashed(life: Life) -> str:
    await _running(life)
    life.rig.world.process("a").kill()
    await life.rest()
    return "a"


async def _broken(life: Life) -> str:
    """Its disk is damaged, and a snapshot of it is not."""
    await _stopped(life)
    vm_id = next(iter(await life.records.vms.scan()))
    life.rig.world.write(vm_id, "data", "good")
    await done(life, "snapshot.create", "a", Take(name="good"))
    life.rig.world.write(vm_id, "data", "lost")
    life.rig.world.storage.there[life.rig.world.volumes[vm_id]["data"].path].damage = "a flipped bit"
    return "a"


async def _went_back(rig: Rig) -> None:
    _, vm_id = await vm_called(rig, "a")
    await _is(S.RUNNING)(rig)
    assert rig.world.content(vm_id, "data") == ("good",)
    kept = next(r.value for r in (await rig.records.snapshots.scan()).values() if r.value.name == "damaged-1")
    assert rig.world.storage.parts[kept.disks["data"]].tokens == ["lost"]


async def _template(life: Life) -> str:
    await _running(life)
    life.rig.world.process("a").memory.append("kept")
    await done(life, "snapshot.create", "a", Take(kind=SnapshotKind.TEMPLATE, name="golden"))
    await done(life, "vm.purge", "a", VmDelete(purge=True, force=True))
    await life.advance(60.0)
    return ""


async def _is_copied(rig: Rig) -> None:
    await _is(S.RUNNING, "b")(rig)
    assert rig.world.process("b").memory == ["kept"]


async def _trashed(life: Life) -> str:
    await _stopped(life)
    await done(life, "vm.delete", "a", VmDelete())
    return "a"


async def _trashed_and_taken(life: Life) -> str:
    await _trashed(life)
    vm_id = next(iter(await life.records.vms.scan()))
    await done(life, "vm.create", "", VmCreate(name="a", image="micro"))
    return vm_id


async def vm_called(rig: Rig, name: str) -> tuple[VmState, str]:
    for id_, row in (await rig.records.vms.scan()).items():
        if row.value.name == name:
            return (await rig.records.statuses.need(id_)).value.observed.state, id_
    return S.GONE, ""


def _is(state: VmState, name: str = "a") -> Callable[[Rig], Awaitable[None]]:
    async def check(rig: Rig) -> None:
        seen, vm_id = await vm_called(rig, name)
        assert seen is state
        if state is S.RUNNING:
            assert rig.world.processes[vm_id].run is RunState.RUNNING
        if state is S.GONE:
            assert not rig.world.volumes

    return check


async def _is_asleep(rig: Rig) -> None:
    await _is(S.SUSPENDED)(rig)
    assert not rig.world.ram_images, "the host has its memory back"


async def _is_awake(rig: Rig) -> None:
    await _is(S.RUNNING)(rig)
    assert rig.world.process("a").memory == ["kept"]
    assert await rig.records.snapshots.scan() == {}


async def _has_given_up(rig: Rig) -> None:
    await _is(S.STOPPED)(rig)
    assert await rig.records.snapshots.scan() == {}
    assert not rig.world.storage.parts


async def _scheduled(life: Life) -> str:
    await _stopped(life)
    made = await life.run("schedule.create", "", ScheduleCreate(label="nobody"))
    return str(made.result["id"])


async def _is_scheduled(rig: Rig) -> None:
    (row,) = (await rig.records.schedules.scan()).values()
    assert format_keep(row.value.keep) == "24h,7d,4w"


async def _is_unscheduled(rig: Rig) -> None:
    assert await rig.records.schedules.scan() == {}


async def _linked(life: Life) -> VmCreate:
    return VmCreate(name="b", snapshot=next(iter(await life.records.snapshots.scan())))


async def _full(life: Life) -> VmCreate:
    return msgspec.structs.replace(await _linked(life), full=True)


async def _is_linked(rig: Rig) -> None:
    state, vm_id = await vm_called(rig, "b")
    volume = rig.world.volumes[vm_id]["data"]
    assert state is S.STOPPED
    assert volume.backing
    assert rig.world.storage.read(volume.path) == ("written",)


async def _is_free(rig: Rig) -> None:
    state, vm_id = await vm_called(rig, "b")
    volume = rig.world.volumes[vm_id]["data"]
    assert state is S.STOPPED
    assert not volume.backing
    assert (await rig.records.vms.need(vm_id)).value.layers == {}
    assert rig.world.storage.read(volume.path) == ("written",)


async def _is_set(rig: Rig) -> None:
    state, vm_id = await vm_called(rig, "b")
    vm = (await rig.records.vms.need(vm_id)).value
    assert (vm.spec.memory, vm.spec.cpu_limit, vm.labels) == (512 * MIB, 0.5, {"x": "y"})
    if state is S.RUNNING:
        assert rig.world.slices[vm_id].cpus == 0.5
        assert rig.world.processes[vm_id].applied.disks[0].limits.iops == 100


async def _has_image(rig: Rig) -> None:
    assert {r.value.image.name for r in (await rig.records.images.scan()).values()} >= {"debian"}


async def _has_no_image(rig: Rig) -> None:
    assert not rig.world.images


async def _has_verified(rig: Rig) -> None:
    assert all(r.value.verified_at and not r.value.damaged for r in (await rig.records.images.scan()).values())


SET = VmSet(
    name="b",
    labels={"x": "y"},
    memory=Bytes(512 * MIB),
    cpu_limit=0.5,
    disks=(msgspec.structs.replace(DISK, limits=IoLimits(iops=100)),),
)
ASLEEP = frozenset({S.SUSPENDED, S.STOPPED, S.CRASHED, S.RUNNING, S.PAUSED})
DOWN = frozenset({S.STOPPED, S.CRASHED, S.RUNNING, S.PAUSED})
WRECK = DOWN | {S.TRASHED, S.DELETING}

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("create", "vm.create", VmCreate(name="a", image="micro", disks=(DISK,)), _nothing, _is(S.STOPPED)),
    Scenario(
        "create-and-start",
        "vm.create",
        VmCreate(name="a", image="micro", disks=(DISK,), start=True),
        _nothing,
        _is(S.RUNNING),
    ),
    Scenario("clone-linked", "vm.create", _linked, _moment, _is_linked),
    Scenario("clone-full", "vm.create", _full, _moment, _is_free),
    Scenario("start", "vm.start", VmStart(), _stopped, _is(S.RUNNING)),
    Scenario("start-paused", "vm.start", VmStart(paused=True), _stopped, _is(S.PAUSED)),
    Scenario(
        "start-crashed",
        "vm.start",
        VmStart(),
        _crashed,
        _is(S.RUNNING),
        restores=False,
        otherwise=frozenset({S.STOPPED, S.CRASHED}),
    ),
    Scenario(
        "start-last-valid",
        "vm.start",
        VmStart(last_valid=True),
        _broken,
        _went_back,
        restores=False,
        otherwise=frozenset({S.STOPPED}),
    ),
    Scenario("stop", "vm.stop", VmStop(), _running, _is(S.STOPPED), restores=False, otherwise=DOWN),
    Scenario("stop-deaf", "vm.stop", VmStop(timeout_s=5.0), _deaf, _is(S.STOPPED), restores=False, otherwise=DOWN),
    Scenario("stop-force", "vm.stop", VmStop(force=True), _paused, _is(S.STOPPED), restores=False, otherwise=DOWN),
    Scenario("restart", "vm.restart", VmStop(), _running, _is(S.RUNNING), restores=False, otherwise=DOWN),
    Scenario("pause", "vm.pause", NoParams(), _running, _is(S.PAUSED)),
    Scenario("resume", "vm.resume", NoParams(), _paused, _is(S.RUNNING)),
    Scenario("suspend", "vm.suspend", NoParams(), _running, _is_asleep, restores=False, otherwise=ASLEEP),
    Scenario("suspend-paused", "vm.suspend", NoParams(), _paused, _is_asleep, restores=False, otherwise=ASLEEP),
    Scenario("start-suspended", "vm.start", VmStart(), _suspended, _is_awake, restores=False, otherwise=ASLEEP),
    Scenario("discard", "vm.discard", NoParams(), _suspended, _has_given_up, restores=False, otherwise=ASLEEP),
    Scenario(
        "purge-suspended",
        "vm.purge",
        VmDelete(purge=True, force=True),
        _suspended,
        _is(S.GONE),
        restores=False,
        otherwise=ASLEEP | {S.DELETING},
    ),
    Scenario("set-stopped", "vm.set", SET, _stopped, _is_set),
    Scenario("set-running", "vm.set", SET, _running, _is_set),
    Scenario("delete", "vm.delete", VmDelete(), _stopped, _is(S.TRASHED)),
    Scenario(
        "delete-force", "vm.delete", VmDelete(force=True), _running, _is(S.TRASHED), restores=False, otherwise=DOWN
    ),
    Scenario("restore", "vm.restore", VmRestore(), _trashed, _is(S.STOPPED)),
    Scenario("restore-renamed", "vm.restore", VmRestore(name="c"), _trashed_and_taken, _is(S.STOPPED, "c")),
    Scenario("purge", "vm.purge", VmDelete(purge=True), _stopped, _is(S.GONE), restores=False, otherwise=WRECK),
    Scenario("purge-trash", "vm.purge", VmDelete(purge=True), _trashed, _is(S.GONE), restores=False, otherwise=WRECK),
    Scenario(
        "purge-force",
        "vm.purge",
        VmDelete(purge=True, force=True),
        _running,
        _is(S.GONE),
        restores=False,
        otherwise=WRECK,
    ),
    Scenario("schedule-create", "schedule.create", ScheduleCreate(label="nobody"), _stopped, _is_scheduled),
    Scenario("schedule-delete", "schedule.delete", NoParams(), _scheduled, _is_unscheduled, restores=False),
    Scenario("run-template", "vm.create", VmCreate(name="b", image="golden", start=True), _template, _is_copied),
    Scenario("image-make", "image.make", ImageMake(DebianRecipe()), _nothing, _has_image),
    Scenario("image-make-again", "image.make", ImageMake(MicroRecipe()), _stopped, _has_verified),
    Scenario("image-delete", "image.delete", NoParams(), _image, _has_no_image, restores=False),
    Scenario("image-verify", "image.verify", NoParams(), _image, _has_verified),
)
