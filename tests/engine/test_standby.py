"""VMs that stand by for templates: who runs one goes on at once, and everybody else's memory comes first."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.standbys import Held
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.snapshot import MachineBuild, SnapshotKind
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import SnapshotSet, SnapshotView, VmCreate, VmDelete
from mica.model.vm import DiskSpec, Publish, VmState
from mica.testing.harness import Life, Rig
from mica.testing.simulated import Behaviour
from tests.engine.worlds import create, do, living, refused

DISK = DiskSpec(name="data", size=Bytes(GIB))
# By then the reconciler has come round often enough for a few.
FILLED_S = 20.0


async def golden(life: Life, standby: int = 0, **body: Any) -> str:
    """The id of a template of a VM that had written, for which so many are to stand by."""
    await create(life, "a", start=True, disks=(DISK,), **body)
    await life.advance(5.0)
    life.rig.world.process("a").memory.append("kept")
    await do(life, "snapshot.create", "a", Take(kind=SnapshotKind.TEMPLATE, name="golden"))
    view = await seen(life)
    if standby:
        await do(life, "snapshot.set", view.snapshot.id, SnapshotSet(standby=standby))
        await life.advance(FILLED_S)
    return view.snapshot.id


async def seen(life: Life) -> SnapshotView:
    return await life.engine.views.template("golden")


async def members(life: Life) -> list[str]:
    return sorted(await life.records.standbys.scan())


async def taken(life: Life, name: str = "b", **body: Any) -> bool:
    """Run the template, and say whether that took one that stood by."""
    before = await members(life)
    await do(life, "vm.create", "", VmCreate(name=name, image="golden", start=True, **body))
    return (await life.engine.views.vm(name)).id in before


async def test_as_many_wait_as_are_wanted_and_nobody_sees_them() -> None:
    async with living() as life:
        await golden(life, 3)
        view = await seen(life)
        assert (view.snapshot.standby, view.standing_by, view.forks) == (3, 3, ())
        assert view.standby_memory == 3 * (64 + 72) * MIB, "what they may write, and QEMU"
        assert [vm.name for vm in (await life.engine.views.vms()).items] == ["a"]
        for vm_id in await members(life):
            process = life.rig.world.processes[vm_id]
            assert "kept" in process.memory
            assert not process.joined
            status = (await life.records.statuses.need(vm_id)).value
            assert (status.observed.state, status.observed.reason) == (VmState.PAUSED, "it stands by")
        await life.advance(600.0)
        assert (await seen(life)).standing_by == 3


async def test_who_runs_it_takes_one_and_another_follows() -> None:
    async with living() as life:
        await golden(life, 1)
        (vm_id,) = await members(life)
        pid = life.rig.world.processes[vm_id].ref
        operation = await do(
            life, "vm.create", "", VmCreate(image="golden", name="b", start=True, labels={"x": "y"}, ephemeral=True)
        )
        vm = await life.engine.views.vm("b")
        assert operation.target == f"vm/{vm_id}"
        assert operation.result == {"id": vm_id, "name": "b"}
        assert [entry.step for entry in operation.journal if entry.event == "started"] == ["record", "run"]
        assert (vm.id, vm.process, vm.observed.state, vm.pending) == (vm_id, pid, VmState.RUNNING, ())
        assert (vm.labels, vm.spec.hostname, vm.spec.ephemeral, vm.created_by) == ({"x": "y"}, "b", True, "tester")
        assert (vm.forked_from, vm.created_at) == ("golden", operation.created_at)
        assert life.rig.world.processes[vm_id].joined
        assert "kept" in life.rig.world.processes[vm_id].memory
        assert (await seen(life)).forks == ("b",)
        await life.advance(FILLED_S)
        assert vm_id not in await members(life)
        assert (await seen(life)).standing_by == 1


async def test_those_of_a_guest_with_frozen_file_systems_thaw_when_they_are_taken() -> None:
    async with living() as life:
        await create(life, "a", start=True, disks=(DISK,))
        await life.advance(5.0)
        await do(life, "snapshot.create", "a", Take(kind=SnapshotKind.TEMPLATE, name="golden", quiesce=True))
        await do(life, "snapshot.set", (await seen(life)).snapshot.id, SnapshotSet(standby=1))
        await life.advance(FILLED_S)
        (vm_id,) = await members(life)
        assert life.rig.world.processes[vm_id].frozen
        assert await taken(life)
        assert not life.rig.world.processes[vm_id].frozen
        assert (await life.records.statuses.need(vm_id)).value.frozen == ""


async def test_nobody_is_told_of_an_agent_before_its_guest_is_somebody() -> None:
    async with living() as life:
        await golden(life)
        told = life.rig.world.ports_told
        told.clear()
        await do(life, "snapshot.set", (await seen(life)).snapshot.id, SnapshotSet(standby=1))
        await life.advance(FILLED_S)
        assert (told, (await seen(life)).standing_by) == ([], 1)
        assert await taken(life)
        assert told == [True]


async def test_each_becomes_somebody_else_when_it_is_taken() -> None:
    async with living() as life:
        await golden(life, 1)
        assert await taken(life)
        vm = await life.engine.views.vm("b")
        original = await life.engine.views.vm("a")
        asked = [a for a in life.engine.env.identities.asked if a.vm_id == vm.id]  # type: ignore[attr-defined]
        assert [a.verb for a in asked] == ["first", "first"]
        assert asked[-1].identity.macs == {original.spec.nics[0].mac: vm.spec.nics[0].mac}
        assert asked[-1].identity.hostname == "b"
        assert vm.identity
        assert all(item.done for item in vm.identity)


async def test_two_requests_never_get_the_same() -> None:
    async with living() as life:
        await golden(life, 2)
        waiting = await members(life)
        bodies = [VmCreate(name=f"b{n}", image="golden", start=True) for n in range(4)]
        accepted = await asyncio.gather(*(life.submit("vm.create", "", body) for body in bodies))
        done = [await life.finish(operation.id) for operation in accepted]
        assert [o.state for o in done] == [OperationState.SUCCEEDED] * 4
        ids = [o.target.partition("/")[2] for o in done]
        assert len(set(ids)) == 4
        assert set(waiting) < set(ids)


@pytest.mark.parametrize("body", [{"publish": (Publish(22),)}, {"cpu_limit": 0.5}])
async def test_what_none_that_waits_has_is_an_ordinary_fork(body: dict[str, Any]) -> None:
    async with living() as life:
        await golden(life, 1)
        assert not await taken(life, **body)
        assert await taken(life, "c")


async def test_a_stopped_copy_and_one_that_may_not_be_named_so_take_none() -> None:
    async with living() as life:
        await golden(life, 1)
        await do(life, "vm.create", "", VmCreate(name="b", image="golden"))
        await refused(life, Code.EXISTS, "vm.create", "", VmCreate(name="a", image="golden", start=True))
        assert (await seen(life)).standing_by == 1


@pytest.mark.parametrize("number", [-1, 65])
async def test_how_many_may_stand_by_is_bounded(number: int) -> None:
    async with living() as life:
        id_ = await golden(life)
        error = await refused(life, Code.INVALID, "snapshot.set", id_, SnapshotSet(standby=number))
        assert (error.message, error.hint) == (f"{number} VMs cannot stand by", "choose from 0 to 64")


async def test_none_stand_by_where_nothing_is_in_memory() -> None:
    async with living() as life:
        await create(life, "a")
        await do(life, "snapshot.create", "a", Take(kind=SnapshotKind.TEMPLATE, name="golden"))
        error = await refused(
            life, Code.INVALID, "snapshot.set", (await seen(life)).snapshot.id, SnapshotSet(standby=1)
        )
        assert error.message == "template golden has no memory: what begins there boots"
        await do(life, "snapshot.create", "a", Take(name="s"))
        id_ = (await life.engine.views.snapshot("a", "s")).snapshot.id
        error = await refused(life, Code.INVALID, "snapshot.set", id_, SnapshotSet(standby=1))
        assert error.message == "no VMs stand by at snapshot s of a"


async def test_they_go_when_fewer_are_wanted_or_none() -> None:
    async with living() as life:
        id_ = await golden(life, 3)
        oldest = next(iter(sorted((await life.records.standbys.scan()).items(), key=lambda i: i[1].value.made_at)))[0]
        await do(life, "snapshot.set", id_, SnapshotSet(standby=1))
        await life.advance(FILLED_S)
        assert await members(life) == [oldest]
        await do(life, "snapshot.set", id_, SnapshotSet(standby=0))
        await life.advance(FILLED_S)
        assert await members(life) == []
        assert set(life.rig.world.processes) == {(await life.engine.views.vm("a")).id}


async def test_they_go_with_the_template_and_stand_in_the_way_of_nothing() -> None:
    async with living() as life:
        id_ = await golden(life)
        await do(life, "snapshot.set", id_, SnapshotSet(standby=2))
        await life.submit("vm.create", "", Held(snapshot=id_, start=True))  # it is just being made
        await do(life, "snapshot.delete", id_, NoParams())
        await life.advance(FILLED_S)
        assert await members(life) == []
        await do(life, "vm.purge", "a", VmDelete(purge=True, force=True))
        await do(life, "image.delete", "micro", NoParams())
        await life.advance(120.0)
        assert not life.rig.world.storage.parts


async def test_one_whose_qemu_ends_is_replaced() -> None:
    async with living() as life:
        await golden(life, 1)
        (vm_id,) = await members(life)
        life.rig.world.processes[vm_id].kill()
        await life.advance(FILLED_S)
        assert vm_id not in await life.records.vms.scan()
        assert (await seen(life)).standing_by == 1


async def test_one_whose_qemu_has_just_ended_is_no_machine_and_says_so() -> None:
    async with living() as life:
        await golden(life, 1)
        (vm_id,) = await members(life)
        operation = await life.submit("vm.create", "", VmCreate(name="b", image="golden", start=True))
        life.rig.world.processes[vm_id].kill("Killed")
        ended = await life.finish(operation.id)
        assert (ended.state, ended.problem and ended.problem.code) == (OperationState.FAILED, Code.QEMU_FAILED)
        assert vm_id not in await life.records.vms.scan()
        await life.advance(FILLED_S)
        assert await taken(life)


async def test_another_daemon_finds_them_and_another_boot_of_the_host_makes_new_ones() -> None:
    async with Rig() as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            await golden(life, 2)
            waiting = await members(life)
        async with rig.life() as again:
            assert await members(again) == waiting
            await again.advance(FILLED_S)
            assert await members(again) == waiting
            assert await taken(again)
        rig.world.reboot()
        async with rig.life() as after:
            await after.advance(FILLED_S)
            assert not set(await members(after)) & set(waiting)
            assert (await seen(after)).standing_by == 2
        assert await rig.lies() == []


async def test_those_of_another_build_of_qemu_end() -> None:
    async with living() as life:
        await golden(life, 2)
        life.rig.world.build = MachineBuild(qemu="9", machine="m", cpu="c", accelerator="a")
        await life.advance(FILLED_S)
        assert await members(life) == []


async def test_those_of_a_damaged_template_end() -> None:
    async with living() as life:
        await golden(life, 2)
        part = (await seen(life)).snapshot.disks["data"]
        await life.records.parts.update(part, lambda p: msgspec.structs.replace(p, damaged="a flipped bit"))
        await life.advance(FILLED_S)
        assert await members(life) == []


async def test_they_give_way_to_whoever_needs_their_memory() -> None:
    async with living(memory=4 * GIB, host_used=256 * MIB) as life:
        await golden(life, 4)
        assert (await seen(life)).standing_by == 4
        waiting = await members(life)
        await create(life, "large", start=True, memory=Bytes(2600 * MIB))
        assert (await life.engine.views.vm("large")).observed.state is VmState.RUNNING
        await life.advance(FILLED_S)
        left = await members(life)
        assert set(left) < set(waiting), "only so many as were in the way, and none is made in their place"
        assert left
        # And what does not fit even so is refused, without a word of VMs that nobody knows.
        error = await refused(
            life,
            Code.INSUFFICIENT_MEMORY,
            "vm.create",
            "",
            VmCreate(name="x", image="micro", memory=Bytes(3 * GIB), start=True),
        )
        assert "standby" not in error.hint
        await do(life, "vm.purge", "large", VmDelete(purge=True, force=True))
        await life.advance(FILLED_S)
        assert (await seen(life)).standing_by == 4


async def test_none_is_made_where_memory_is_not_to_spare() -> None:
    async with living(memory=GIB + 256 * MIB, host_used=128 * MIB) as life:
        await golden(life, 4)
        assert (await seen(life)).standing_by == 0
        assert await members(life) == []


async def test_what_cannot_be_made_is_tried_again_ever_more_rarely() -> None:
    async with living() as life:
        id_ = await golden(life)
        life.rig.world.faults.fail("hypervisor.launch", MicaError(Code.QEMU_FAILED, "no"), call=0)
        await do(life, "snapshot.set", id_, SnapshotSet(standby=1))
        await life.advance(300.0)
        tried = [o for o in (await life.records.operations.scan()).values() if o.value.params.get("held")]
        assert 3 <= len(tried) <= 8
        life.rig.world.faults.clear()
        await life.advance(700.0)
        assert (await seen(life)).standing_by == 1


async def test_a_guest_whose_agent_does_not_answer_waits_all_the_same() -> None:
    async with living() as life:
        id_ = await golden(life)
        life.rig.world.default = Behaviour(agent_after_s=None)
        await do(life, "snapshot.set", id_, SnapshotSet(standby=1))
        await life.advance(60.0)
        assert await taken(life)
