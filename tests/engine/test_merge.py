"""Layers that nothing needs but the one over them are merged, whoever dies in between, and disks read as before."""

from __future__ import annotations

import pytest

from mica.engine.definition import NoParams
from mica.engine.forking import fork
from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.engine.reconcilers import merge
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.snapshot import Part, Snapshot
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmCreate, VmDelete, VmFork, VmStart
from mica.model.vm import DiskSpec
from mica.storage.chain import MAX_CHAIN
from mica.testing.harness import BY, Life, Rig
from mica.testing.store_faults import Fault, When
from tests.engine.worlds import create, do, living

DISK = DiskSpec(name="data", size=Bytes(GIB))
# By then every loop has come round that merges or removes.
LATER_S = 200.0


async def written(life: Life, words: str) -> str:
    """A VM with a snapshot called after each word, which was written before."""
    vm = await create(life, disks=(DISK,))
    for word in words:
        life.rig.world.write(vm.id, "data", word)
        await do(life, "snapshot.create", "a", Take(name=word))
    return vm.id


async def by_name(life: Life) -> dict[str, Snapshot]:
    return {row.value.name: row.value for row in (await life.records.snapshots.scan()).values()}


async def delete(life: Life, names: str) -> None:
    for name in names:
        await do(life, "snapshot.delete", (await by_name(life))[name].id, NoParams())


async def parts(life: Life) -> dict[str, Part]:
    return {id_: row.value for id_, row in (await life.records.parts.scan()).items()}


async def read(life: Life, name: str) -> str:
    part = (await by_name(life))[name].disks["data"]
    return "".join(life.rig.world.storage.read(life.engine.env.parts.path(part)))


async def test_what_deleted_snapshots_left_is_merged_into_what_lies_over_it() -> None:
    async with living() as life:
        vm_id = await written(life, "bcdefg")
        await do(life, "vm.create", "", VmCreate(name="fork", snapshot=(await by_name(life))["f"].id))
        other = (await life.engine.views.vm("fork")).id
        await delete(life, "bdeg")
        await life.advance(LATER_S)
        # c over b; f, which both g and the fork lie over, over d and e; the VM over g.
        assert len(await parts(life)) == 3
        assert set(life.rig.world.storage.parts) == set(await parts(life))
        assert await read(life, "c") == "bc"
        assert await read(life, "f") == "bcdef"
        assert "".join(life.rig.world.content(vm_id, "data")) == "bcdefg"
        assert "".join(life.rig.world.content(other, "data")) == "bcdef"
        for name in "cf":
            ended = await do(life, "snapshot.verify", (await by_name(life))[name].id, NoParams())
            assert ended.result["damaged"] == {}
        await do(life, "snapshot.restore", "a", Revert(snapshot=(await by_name(life))["c"].id))
        assert "".join(life.rig.world.content(vm_id, "data")) == "bc"


async def test_a_vm_that_was_forked_more_often_than_a_chain_is_long_goes_on() -> None:
    async with living() as life:
        await create(life, disks=(DISK,))
        await do(life, "vm.start", "a", VmStart())
        await life.advance(2.0)
        for number in range(MAX_CHAIN + 4):
            accepted = await fork(life.engine, "a", VmFork(name=f"f{number}"), by=BY)
            for operation in accepted.operations:
                ended = await life.finish(operation.id)
                assert ended.state is OperationState.SUCCEEDED, (number, ended.problem)
            await do(life, "vm.purge", f"f{number}", VmDelete(purge=True, force=True))
            await life.advance(130.0)
        assert len(life.rig.world.storage.parts) < 6


async def test_snapshots_beyond_the_bound_are_refused_until_others_are_deleted() -> None:
    async with living() as life:
        words = "bcdefghijklmnopqrstuvwxyz"[: MAX_CHAIN - 1]
        await written(life, words)
        ended = await life.run("snapshot.create", "a", Take(name="more"))
        assert ended.problem is not None
        assert ended.problem.code is Code.STATE_CONFLICT
        await delete(life, words[3])
        await life.advance(LATER_S)
        await do(life, "snapshot.create", "a", Take(name="more"))


@pytest.mark.parametrize("when", When)
async def test_a_daemon_that_dies_anywhere_goes_on(when: When) -> None:
    commit, crashed = 1, True
    while crashed:
        async with Rig() as rig:
            rig.world.add_image("micro")
            async with rig.life() as life:
                await life.advance(0.1)
                vm_id = await written(life, "bcd")
                await delete(life, "bc")
                before = len(await parts(life))
                assert before == 3
            async with rig.life(faults=[Fault(commit, when=when)]) as life:
                await life.advance(LATER_S)
            crashed = rig.crashes > 0
            async with rig.life() as life:
                await life.advance(LATER_S)
                assert len(await parts(life)) == 1, commit
                assert await read(life, "d") == "bcd"
                assert "".join(rig.world.content(vm_id, "data")) == "bcd"
                await do(life, "vm.start", "a", VmStart())
                ended = await do(life, "snapshot.verify", (await by_name(life))["d"].id, NoParams())
                assert ended.result["damaged"] == {}
            assert await rig.lies() == []
        commit += 1
    assert commit > 5


@pytest.mark.parametrize("call", ["branches.merge", "branches.put_merged", "branches.drop_merged", "parts.verify"])
async def test_what_fails_is_tried_again(call: str) -> None:
    async with living() as life:
        vm_id = await written(life, "bcd")
        await delete(life, "bc")
        life.rig.world.faults.fail(call, MicaError(Code.COMMAND_FAILED, "as the test wanted"))
        await life.advance(2 * LATER_S)
        assert life.rig.world.faults.struck
        assert len(await parts(life)) == 1
        assert "".join(life.rig.world.content(vm_id, "data")) == "bcd"
        assert not life.rig.world.storage.scratch


async def test_damage_is_not_merged_into_what_is_whole() -> None:
    async with living() as life:
        await written(life, "bcd")
        below = (await by_name(life))["b"].disks["data"]
        await delete(life, "b")
        life.rig.world.storage.parts[below].damage = "a bit"
        await life.advance(LATER_S)
        assert len(await parts(life)) == 3
        assert life.rig.world.faults.calls["branches.merge"] == 0
        assert (await life.engine.views.snapshot("a", "c")).damaged


async def test_without_room_nothing_is_merged_until_there_is() -> None:
    async with living() as life:
        await written(life, "bcd")
        await delete(life, "bc")
        free, life.rig.world.disk_free = life.rig.world.disk_free, MIB // 2
        await life.advance(LATER_S)
        assert len(await parts(life)) == 3
        assert all(part.merging is None for part in (await parts(life)).values())
        life.rig.world.disk_free = free
        await life.advance(LATER_S)
        assert len(await parts(life)) == 1


async def test_nothing_is_merged_under_an_operation() -> None:
    async with living() as life:
        await written(life, "bcd")
        await delete(life, "bc")
        life.rig.world.faults.slow("hypervisor.launch", 30.0, call=1)
        operation = await life.submit("vm.start", "a", VmStart())
        await life.advance(0.1)
        assert await merge.reconcile(life.engine.env) == ""
        assert life.rig.world.faults.calls["branches.merge"] == 0
        await life.finish(operation.id)
        assert await merge.reconcile(life.engine.env) == "merged 2 layers of disks into those over them"
