"""Scenarios of snapshots and forks for the crash harness: guests that write, and must find what they have written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.engine.standbys import Held
from mica.model.image import Firmware
from mica.model.snapshot import Snapshot, SnapshotKind, SnapshotState
from mica.model.units import MIB, Bytes
from mica.model.views import SnapshotSet, VmCreate, VmStart
from mica.model.vm import DiskSpec, NicSpec, Publish, VmState
from mica.ports.hypervisor import RunState
from mica.testing.harness import Life, Rig
from mica.testing.simulated import Behaviour
from tests.engine.scenarios import Scenario, done, vm_called

DISK = DiskSpec(name="data", size=Bytes(64 * MIB))
WRITES = Behaviour(agent_after_s=0.2, writes=True)
PUBLISHED = (NicSpec(publish=(Publish(guest_port=22, host_port=2222),)),)

S = VmState
# What may become of a VM whose machine is ended to go back, and which cannot: its disks are at the snapshot or not yet.
BACK = frozenset({S.STOPPED, S.CRASHED, S.RUNNING, S.PAUSED})


async def stopped(life: Life, *, firmware: Firmware = Firmware.BIOS) -> str:
    world = life.rig.world
    world.default = WRITES
    world.add_image("micro")
    await life.advance(0.1)
    body = VmCreate(name="a", image="micro", disks=(DISK,), firmware=firmware, nics=PUBLISHED)
    await done(life, "vm.create", "", body)
    return "a"


async def running(life: Life, *, firmware: Firmware = Firmware.BIOS) -> str:
    await stopped(life, firmware=firmware)
    await done(life, "vm.start", "a", VmStart())
    await life.advance(1.0)
    return "a"


async def with_firmware(life: Life) -> str:
    return await running(life, firmware=Firmware.UEFI)


async def paused(life: Life) -> str:
    await running(life)
    await done(life, "vm.pause", "a", NoParams())
    return "a"


def having(prepare: Callable[[Life], Awaitable[str]], **take: object) -> Callable[[Life], Awaitable[str]]:
    """A VM with a snapshot ``s``, which has written something since."""

    async def prepared(life: Life) -> str:
        await prepare(life)
        await done(life, "snapshot.create", "a", Take(name="s", **take))  # type: ignore[arg-type]
        for process in life.rig.world.processes.values():
            process.write("since")
        return "a"

    return prepared


def changed_much(prepare: Callable[[Life], Awaitable[str]]) -> Callable[[Life], Awaitable[str]]:
    """A child that has changed more of its RAM image than is written down each time."""

    async def prepared(life: Life) -> str:
        name = await having(prepare)(life)
        life.rig.world.default = replace(WRITES, word=1024 * MIB)
        for process in life.rig.world.processes.values():
            process.behaviour = life.rig.world.default
        return name

    return prepared


def is_folded(state: VmState) -> Callable[[Rig], Awaitable[None]]:
    """As any other, over a RAM image of its own that has all that the machine had written by then."""

    async def check(rig: Rig) -> None:
        await is_taken(state, parts=3)(rig)
        first, second = await named(rig, "s"), await named(rig, "t")
        assert first.memory is not None
        assert second.memory is not None
        assert second.memory.ram != first.memory.ram
        _, vm_id = await vm_called(rig, "a")
        machine = rig.world.processes[vm_id]
        assert machine.plan.origin is not None
        assert machine.plan.origin.ram == second.memory.ram
        assert "since" in rig.world.ram_images[second.memory.ram]
        assert "since" not in rig.world.ram_images.get(first.memory.ram, [])
        assert "since" in machine.memory
        assert not rig.world.ram_copies

    return check


def of_snapshot(prepare: Callable[[Life], Awaitable[str]]) -> Callable[[Life], Awaitable[str]]:
    """The target is the snapshot ``s``."""

    async def prepared(life: Life) -> str:
        await prepare(life)
        return next(iter(await life.records.snapshots.scan()))

    return prepared


async def named(rig: Rig, name: str) -> Snapshot:
    return next(r.value for r in (await rig.records.snapshots.scan()).values() if r.value.name == name)


def is_taken(state: VmState, *, memory: bool = True, parts: int) -> Callable[[Rig], Awaitable[None]]:
    """A complete snapshot ``t`` of so many parts, and the VM as it was."""

    async def check(rig: Rig) -> None:
        snapshot = await named(rig, "t")
        assert (snapshot.state, snapshot.memory is not None) == (SnapshotState.COMPLETE, memory)
        assert len(snapshot.parts) == parts
        found, vm_id = await vm_called(rig, "a")
        assert found is state
        vm = (await rig.records.vms.need(vm_id)).value
        assert (vm.snapshot, vm.layers) == (snapshot.id, snapshot.disks)
        if state is not S.STOPPED:
            machine = rig.world.processes[vm_id]
            assert machine.joined
            assert machine.run is (RunState.RUNNING if state is S.RUNNING else RunState.PAUSED)
            assert machine.disks["data"] == rig.world.volumes[vm_id]["data"].path

    return check


async def is_a_moment(rig: Rig) -> None:
    """The reaper may have been there already."""
    found, vm_id = await vm_called(rig, "a")
    assert found is S.RUNNING
    assert rig.world.processes[vm_id].plan.incarnation == 1
    assert {r.value.kind for r in (await rig.records.snapshots.scan()).values()} <= {SnapshotKind.FORK}


def is_back(state: VmState, words: tuple[str, ...]) -> Callable[[Rig], Awaitable[None]]:
    """What was written since the snapshot is not there; that it runs was written after it."""

    async def check(rig: Rig) -> None:
        found, vm_id = await vm_called(rig, "a")
        assert found is state
        assert _without_own(rig.world.content(vm_id, "data")) == words
        if state is S.RUNNING:
            assert rig.world.processes[vm_id].joined
            assert _without_own(rig.world.processes[vm_id].memory) == words

    return check


def _without_own(words: object) -> tuple[str, ...]:
    """Without what a guest writes whenever its vCPUs are let go."""
    return tuple(word for word in words if "-" not in word)  # type: ignore[attr-defined]


async def is_gone(rig: Rig) -> None:
    assert not await rig.records.snapshots.scan()
    _, vm_id = await vm_called(rig, "a")
    assert (await rig.records.vms.need(vm_id)).value.snapshot == ""


async def is_set(rig: Rig) -> None:
    snapshot = await named(rig, "u")
    assert (snapshot.description, snapshot.protected) == ("why", True)


async def is_verified(rig: Rig) -> None:
    assert all(row.value.verified_at for row in (await rig.records.parts.scan()).values())


def is_fork(state: VmState) -> Callable[[Rig], Awaitable[None]]:
    async def check(rig: Rig) -> None:
        found, vm_id = await vm_called(rig, "b")
        assert found is state
        vm = (await rig.records.vms.need(vm_id)).value
        assert vm.forked_from == "a"
        assert vm.layers == (await named(rig, "s")).disks
        assert "since" not in rig.world.content(vm_id, "data")
        if state is S.RUNNING:
            assert rig.world.processes[vm_id].joined
            assert "since" not in rig.world.processes[vm_id].memory
            parent = rig.world.processes[(await vm_called(rig, "a"))[1]]
            assert "since" in parent.memory

    return check


async def golden(life: Life) -> str:
    """A template for which one VM is to stand by, on a host with memory for hardly more than that."""
    await running(life)
    await done(life, "snapshot.create", "a", Take(kind=SnapshotKind.TEMPLATE, name="golden"))
    life.rig.world.memory = 2400 * MIB
    await done(life, "snapshot.set", (await named(life.rig, "golden")).id, SnapshotSet(standby=1))
    return ""


async def standing(life: Life) -> str:
    await golden(life)
    await done(life, "vm.create", "", await _held(life))
    life.rig.world.memory = 2840 * MIB  # for one more, should it not be found at once
    return ""


async def _held(life: Life) -> Held:
    return Held(snapshot=(await named(life.rig, "golden")).id, start=True)


async def stands_by(rig: Rig) -> None:
    (vm_id,) = await rig.records.standbys.scan()
    process = rig.world.processes[vm_id]
    assert (process.run, process.joined) == (RunState.PAUSED, False)
    assert (await rig.records.statuses.need(vm_id)).value.observed.state is S.PAUSED
    assert (await rig.records.vms.need(vm_id)).value.hidden


async def is_taken_over(rig: Rig) -> None:
    found, vm_id = await vm_called(rig, "b")
    assert found is S.RUNNING
    assert rig.world.processes[vm_id].joined
    vm = (await rig.records.vms.need(vm_id)).value
    assert (vm.hidden, vm.spec.hostname, vm.forked_from) == (False, "b", "golden")
    others = await rig.records.standbys.scan()
    assert vm_id not in others
    assert rig.world.processes[vm_id].plan.vm.hidden or others, "one that stood by was taken, unless it was not found"


async def _revert(life: Life) -> Revert:
    return Revert(snapshot=next(iter(await life.records.snapshots.scan())))


async def _revert_disks(life: Life) -> Revert:
    return Revert(snapshot=next(iter(await life.records.snapshots.scan())), memory=False)


async def _fork(life: Life) -> VmCreate:
    return VmCreate(name="b", snapshot=next(iter(await life.records.snapshots.scan())), start=True)


async def _stopped_copy(life: Life) -> VmCreate:
    return VmCreate(name="b", snapshot=next(iter(await life.records.snapshots.scan())))


T = Take(name="t")


def _take(
    name: str,
    params: Take,
    prepare: Callable[[Life], Awaitable[str]],
    check: Callable[[Rig], Awaitable[None]],
    state: VmState = S.RUNNING,
) -> Scenario:
    """Once the machine went on it is over new layers, whatever becomes of the snapshot; no guest sees that."""
    return Scenario(name, "snapshot.create", params, prepare, check, until="go-on", otherwise=frozenset({state}))


SNAPSHOT_SCENARIOS: tuple[Scenario, ...] = (
    _take("snapshot-own", T, with_firmware, is_taken(S.RUNNING, parts=4)),
    _take("snapshot-child", T, having(paused), is_taken(S.PAUSED, parts=4), S.PAUSED),
    _take("snapshot-fold", T, changed_much(running), is_folded(S.RUNNING)),
    _take("snapshot-stopped", T, stopped, is_taken(S.STOPPED, memory=False, parts=1), S.STOPPED),
    _take(
        "snapshot-disks",
        Take(name="t", memory=False, quiesce=True),
        running,
        is_taken(S.RUNNING, memory=False, parts=1),
    ),
    _take("snapshot-fork", Take(kind=SnapshotKind.FORK), running, is_a_moment),
    Scenario(
        "revert", "snapshot.restore", _revert, having(running), is_back(S.RUNNING, ()), restores=False, otherwise=BACK
    ),
    Scenario(
        "revert-disks",
        "snapshot.restore",
        _revert_disks,
        having(running),
        is_back(S.STOPPED, ()),
        restores=False,
        otherwise=BACK,
    ),
    Scenario("snapshot-delete", "snapshot.delete", NoParams(), of_snapshot(having(running)), is_gone, restores=False),
    Scenario(
        "snapshot-set",
        "snapshot.set",
        SnapshotSet(name="u", description="why", protected=True),
        of_snapshot(having(stopped)),
        is_set,
    ),
    Scenario("snapshot-verify", "snapshot.verify", NoParams(), of_snapshot(having(running)), is_verified),
    Scenario("fork", "vm.create", _fork, having(running), is_fork(S.RUNNING)),
    Scenario("standby", "vm.create", _held, golden, stands_by),
    Scenario(
        "take",
        "vm.create",
        VmCreate(name="b", image="golden", start=True),
        standing,
        is_taken_over,
        restores=False,
        otherwise=frozenset({S.RUNNING, S.PAUSED}),  # the VM, and another one that stands by
        attached=True,
    ),
    Scenario("copy-of-disks", "vm.create", _stopped_copy, having(stopped), is_fork(S.STOPPED)),
)
