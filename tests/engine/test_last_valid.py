"""A VM that damage keeps from starting goes back to its last valid snapshot, and nothing is lost."""

from __future__ import annotations

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.model.errors import Code
from mica.model.operation import OperationState
from mica.model.snapshot import Snapshot
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmSet, VmStart, VmStop
from mica.model.vm import DiskSpec
from mica.testing.harness import Life
from tests.engine.worlds import create, do, living

DISK = DiskSpec(name="data", size=Bytes(GIB))
BACK = VmStart(last_valid=True)


async def by_name(life: Life) -> dict[str, Snapshot]:
    return {row.value.name: row.value for row in (await life.records.snapshots.scan()).values()}


async def written(life: Life, *words: str) -> str:
    """A VM with a snapshot called after each word, which was written to its disk before, and then one more word."""
    vm = await create(life, disks=(DISK,))
    for word in words:
        life.rig.world.write(vm.id, "data", word)
        await do(life, "snapshot.create", "a", Take(name=word))
        await life.advance(1.0)
    life.rig.world.write(vm.id, "data", "last")
    return vm.id


def break_top(life: Life, vm_id: str, how: str = "bits have flipped") -> None:
    world = life.rig.world
    world.storage.there[world.volumes[vm_id]["data"].path].damage = how


async def test_what_can_start_starts_as_it_is() -> None:
    async with living() as life:
        vm_id = await written(life, "one")
        ended = await do(life, "vm.start", "a", BACK)
        assert ended.result == {}
        assert life.rig.world.content(vm_id, "data") == ("one", "last")


async def test_a_vm_may_be_told_to_go_back_by_itself_each_time() -> None:
    async with living() as life:
        vm_id = await written(life, "one")
        await do(life, "vm.set", "a", VmSet(last_valid=True))
        await do(life, "vm.start", "a", VmStart())
        await do(life, "vm.stop", "a", VmStop(force=True))
        for kept in ("damaged-1", "damaged-2"):
            break_top(life, vm_id)
            ended = await do(life, "vm.start", "a", VmStart())
            assert (ended.result["went_back_to"], ended.result["kept_aside"]) == ("one", kept)
            await do(life, "vm.stop", "a", VmStop(force=True))
        await do(life, "vm.set", "a", VmSet(last_valid=False))
        break_top(life, vm_id)
        assert (await life.run("vm.start", "a", VmStart())).state is OperationState.FAILED


async def test_a_damaged_disk_is_kept_aside_and_the_newest_snapshot_runs() -> None:
    async with living() as life:
        vm_id = await written(life, "one", "two")
        break_top(life, vm_id)
        failed = await life.run("vm.start", "a", VmStart())
        assert failed.problem is not None
        assert failed.problem.details["last_valid"] == "two"
        ended = await do(life, "vm.start", "a", BACK)
        assert (ended.result["went_back_to"], ended.result["kept_aside"]) == ("two", "damaged-1")
        assert "bits have flipped" in ended.result["because"]
        assert life.rig.world.content(vm_id, "data") == ("one", "two")
        snapshots = await by_name(life)
        part = snapshots["damaged-1"].disks["data"]
        assert life.rig.world.storage.read(life.engine.env.parts.path(part)) == ("one", "two", "last")
        assert (await life.engine.views.snapshot("a", "damaged-1")).damaged
        view = await life.engine.views.vm("a")
        assert (view.snapshot, view.damaged) == (snapshots["two"].id, ())
        # Nobody takes away what it lies over, until it is deleted.
        await life.advance(120.0)
        assert life.rig.world.storage.read(life.engine.env.parts.path(part)) == ("one", "two", "last")
        await do(life, "snapshot.delete", snapshots["damaged-1"].id, NoParams())
        assert part not in life.rig.world.storage.parts


async def test_what_is_found_damaged_on_the_way_is_passed_over() -> None:
    async with living() as life:
        vm_id = await written(life, "one", "two")
        break_top(life, vm_id)
        two = (await by_name(life))["two"].disks["data"]
        life.rig.world.storage.parts[two].damage = "another bit"  # which nobody has seen yet
        ended = await do(life, "vm.start", "a", BACK)
        assert ended.result["went_back_to"] == "one"
        assert life.rig.world.content(vm_id, "data") == ("one",)
        assert (await life.engine.views.snapshot("a", "two")).damaged
        # The file below is restored: nothing that lies over it is lost.
        life.rig.world.storage.parts[two].damage = ""
        await do(life, "vm.stop", "a", VmStop(force=True))
        await do(life, "snapshot.verify", (await by_name(life))["two"].id, NoParams())
        await do(life, "snapshot.restore", "a", Revert(snapshot=(await by_name(life))["two"].id))
        assert life.rig.world.content(vm_id, "data") == ("one", "two")


async def test_a_state_over_a_layer_that_is_restored_can_be_gone_back_to() -> None:
    async with living() as life:
        vm_id = await written(life, "one", "two")
        snapshots = await by_name(life)
        two = snapshots["two"].disks["data"]
        life.rig.world.storage.parts[two].damage = "a bit"
        await life.run("snapshot.verify", snapshots["two"].id, NoParams())
        ended = await do(life, "vm.start", "a", BACK)
        assert ended.result["went_back_to"] == "one"
        life.rig.world.storage.parts[two].damage = ""
        await do(life, "snapshot.verify", snapshots["two"].id, NoParams())
        await life.advance(150.0)
        kept = (await life.records.parts.need((await by_name(life))["damaged-1"].disks["data"])).value
        assert kept.digest
        assert not kept.damaged
        await do(life, "vm.stop", "a", VmStop(force=True))
        await do(life, "snapshot.restore", "a", Revert(snapshot=(await by_name(life))["damaged-1"].id))
        assert life.rig.world.content(vm_id, "data") == ("one", "two", "last")


async def test_a_snapshot_with_memory_goes_on_where_it_was_and_with_the_spec_of_then() -> None:
    async with living() as life:
        vm = await create(life, disks=(DISK,), memory=Bytes(512 * MIB))
        await do(life, "vm.start", "a", VmStart())
        await life.advance(2.0)
        life.rig.world.process("a").memory.append("thought")
        await do(life, "snapshot.create", "a", Take(name="one"))
        await do(life, "vm.stop", "a", VmStop(force=True))
        await do(life, "vm.set", "a", VmSet(memory=Bytes(256 * MIB)))
        break_top(life, vm.id)
        await do(life, "vm.start", "a", BACK)
        assert life.rig.world.process("a").memory == ["thought"]
        assert (await life.engine.views.vm("a")).spec.memory == 512 * MIB


async def test_without_a_valid_snapshot_it_says_so_and_changes_nothing() -> None:
    async with living() as life:
        vm_id = await written(life, "one")
        break_top(life, vm_id)
        one = (await by_name(life))["one"].disks["data"]
        life.rig.world.storage.parts[one].damage = "a bit"
        ended = await life.run("vm.start", "a", BACK)
        assert ended.state is OperationState.FAILED
        assert ended.problem is not None
        assert ended.problem.code is Code.CORRUPT
        assert "no valid snapshot; found damaged just now: one" in ended.problem.message
        assert list(await by_name(life)) == ["one"]
        assert life.rig.world.storage.there[life.rig.world.volumes[vm_id]["data"].path].tokens == ["last"]
