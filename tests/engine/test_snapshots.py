"""Snapshots, ways back and forks: every one has exactly the words, in memory and on disk, of its moment."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mica.engine import forking
from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.operations.snapshot_restore import Revert
from mica.model.errors import Code, MicaError
from mica.model.image import Firmware
from mica.model.operation import OperationState
from mica.model.snapshot import Snapshot, SnapshotKind
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import SnapshotRestore, SnapshotSet, VmCreate, VmDelete, VmFork, VmSet, VmStart, VmStop
from mica.model.vm import DiskSpec, VmState
from mica.testing.harness import BY, Life, Rig
from mica.testing.simulated import Behaviour
from tests.engine.worlds import create, do, living, refused

DISK = DiskSpec(name="data", size=Bytes(64 * MIB))


async def running(life: Life, name: str = "a", **body: object) -> str:
    life.rig.world.default = Behaviour(agent_after_s=0.2)
    vm = await create(life, name, disks=(DISK,), **body)
    await do(life, "vm.start", name, VmStart())
    await life.advance(1.0)
    return vm.id


async def take(life: Life, name: str = "", vm: str = "a", **how: object) -> Snapshot:
    ended = await do(life, "snapshot.create", vm, Take(name=name, **how))  # type: ignore[arg-type]
    return (await life.records.snapshots.need(ended.result["id"])).value


async def fork(life: Life, vm: str = "a", **body: object) -> list[str]:
    accepted = await forking.fork(life.engine, vm, VmFork(**body), by=BY)  # type: ignore[arg-type]
    for operation in accepted.operations:
        ended = await life.finish(operation.id)
        assert ended.state is OperationState.SUCCEEDED, ended.problem
    return [operation.target.partition("/")[2] for operation in accepted.operations]


def write(life: Life, vm: str, word: str) -> None:
    life.rig.world.process(vm).write(word)


def has(life: Life, vm: str) -> tuple[list[str], list[str]]:
    """What the guest finds in its memory, and on its disk."""
    process = life.rig.world.process(vm)
    return list(process.memory), list(life.rig.world.storage.read(process.disks["data"]))


def both(*words: str) -> tuple[list[str], list[str]]:
    return list(words), list(words)


async def named(life: Life) -> dict[str, Snapshot]:
    return {row.value.name: row.value for row in (await life.records.snapshots.scan()).values()}


async def state(life: Life, vm: str = "a") -> VmState:
    return (await life.engine.views.vm(vm)).observed.state


async def test_going_back_brings_memory_and_disks_and_the_tree_tells_from_where() -> None:
    async with living() as life:
        await running(life, firmware=Firmware.UEFI)
        for word in ("one", "two", "three"):
            write(life, "a", word)
            await take(life, word)
        write(life, "a", "lost")
        await do(life, "snapshot.restore", "a", Revert(snapshot=(await named(life))["one"].id))
        assert has(life, "a") == both("one")
        write(life, "a", "other")
        await take(life, "branch")
        found = await named(life)
        parents = {s.name: next((p.name for p in found.values() if p.id == s.parent), "") for s in found.values()}
        assert parents == {"one": "", "two": "one", "three": "two", "branch": "one"}
        for name, words in (("three", ("one", "two", "three")), ("branch", ("one", "other")), ("two", ("one", "two"))):
            await do(life, "snapshot.restore", "a", Revert(snapshot=found[name].id))
            assert has(life, "a") == both(*words)
            assert life.rig.world.process("a").joined


async def test_the_present_state_is_kept_before_it_is_given_up() -> None:
    async with living() as life:
        await running(life)
        write(life, "a", "one")
        await take(life, "first")
        write(life, "a", "two")
        back = await forking.restore(life.engine, "a", "first", SnapshotRestore(), by=BY)
        assert (await life.finish(back.id)).state is OperationState.SUCCEEDED
        assert has(life, "a") == both("one")
        kept = (await named(life))["before-restore-1"]
        assert kept.kind is SnapshotKind.SAFETY
        again = await forking.restore(life.engine, "a", kept.name, SnapshotRestore(keep=False), by=BY)
        assert (await life.finish(again.id)).state is OperationState.SUCCEEDED
        assert has(life, "a") == both("one", "two")
        assert set(await named(life)) == {"first", "before-restore-1"}


async def test_what_cannot_be_kept_is_not_given_up() -> None:
    async with living() as life:
        await running(life)
        await take(life, "first")
        write(life, "a", "precious")
        life.rig.world.faults.fail("parts.seal", call=0)
        back = await forking.restore(life.engine, "a", "first", SnapshotRestore(), by=BY)
        ended = await life.finish(back.id)
        life.rig.world.faults.clear()
        assert ended.state is OperationState.FAILED
        assert has(life, "a") == both("precious")


async def test_without_memory_it_is_stopped_and_a_stopped_one_starts_with_memory() -> None:
    async with living() as life:
        vm_id = await running(life)
        write(life, "a", "one")
        snapshot = await take(life, "s")
        write(life, "a", "two")
        await do(life, "snapshot.restore", "a", Revert(snapshot=snapshot.id, memory=False))
        assert await state(life) is VmState.STOPPED
        assert life.rig.world.content(vm_id, "data") == ("one",)
        await do(life, "snapshot.restore", "a", Revert(snapshot=snapshot.id))
        assert await state(life) is VmState.RUNNING
        assert has(life, "a") == both("one")


async def test_names_are_made_unique_changed_and_protected() -> None:
    async with living() as life:
        await create(life, disks=(DISK,))
        assert [(await take(life)).name for _ in range(2)] == ["snapshot-1", "snapshot-2"]
        first = (await named(life))["snapshot-1"].id
        await refused(life, Code.EXISTS, "snapshot.create", "a", Take(name="snapshot-1"))
        await refused(life, Code.EXISTS, "snapshot.set", first, SnapshotSet(name="snapshot-2"))
        await refused(life, Code.INVALID, "snapshot.create", "a", Take(name="No!"))
        await do(life, "snapshot.set", first, SnapshotSet(name="kept", protected=True))
        await refused(life, Code.PROTECTED, "snapshot.delete", first, NoParams())
        assert (await take(life)).name == "snapshot-1"
        await do(life, "snapshot.set", first, SnapshotSet(protected=False))
        await do(life, "snapshot.delete", first, NoParams())
        assert set(await named(life)) == {"snapshot-1", "snapshot-2"}


async def test_damage_is_found_marked_and_refused_and_the_last_good_one_stays() -> None:
    async with living() as life:
        await running(life)
        good, bad = await take(life, "good"), await take(life, "bad")
        assert bad.memory is not None
        life.rig.world.storage.parts[bad.memory.devices].damage = "a flipped bit"
        ended = await do(life, "snapshot.verify", bad.id, NoParams())
        assert list(ended.result["damaged"]) == [bad.memory.devices]
        await refused(life, Code.CORRUPT, "snapshot.restore", "a", Revert(snapshot=bad.id))
        await refused(life, Code.CORRUPT, "vm.create", "", VmCreate(snapshot=bad.id, start=True))
        await refused(life, Code.PROTECTED, "snapshot.delete", good.id, NoParams())
        assert await state(life) is VmState.RUNNING
        await do(life, "snapshot.delete", bad.id, NoParams())
        await do(life, "snapshot.delete", good.id, NoParams())


async def test_forks_of_forks_and_of_snapshots_begin_at_their_moment() -> None:
    async with living() as life:
        await running(life)
        write(life, "a", "one")
        old = await take(life, "old")
        write(life, "a", "two")
        (child,) = await fork(life, name="b")
        write(life, "a", "parent")
        write(life, "b", "child")
        await fork(life, "b", name="c")
        await fork(life, name="d", snapshot=old.id)
        assert has(life, "a") == both("one", "two", "parent")
        assert has(life, "b") == both("one", "two", "child")
        assert has(life, "c") == both("one", "two", "child")
        assert has(life, "d") == both("one")
        macs = {(await life.engine.views.vm(name)).spec.nics[0].mac for name in "abcd"}
        assert len(macs) == 4
        status = (await life.records.statuses.need(child)).value
        assert {item.what for item in status.identity if item.done} >= {"random", "mac"}
        await life.advance(10.0)
        status = (await life.records.statuses.need(child)).value
        assert status.becoming is None
        assert {item.what for item in status.identity if item.done} >= {"hostname", "machine-id", "ssh-host-keys"}


@pytest.mark.parametrize("order", ["abc", "cba", "bac"])
async def test_vms_are_deleted_in_any_order_and_leave_nothing(order: str) -> None:
    async with living() as life:
        await running(life)
        write(life, "a", "one")
        await take(life, "s")
        await fork(life, name="b")
        await fork(life, "b", name="c")
        alive = list("abc")
        for name in order:
            await do(life, "vm.purge", name, VmDelete(purge=True, force=True))
            await life.reap()
            alive.remove(name)
            assert [has(life, other) for other in alive] == [both("one")] * len(alive)
        await life.reap()
        world = life.rig.world
        assert (world.storage.parts, world.ram_images, world.volumes) == ({}, {}, {})
        assert await life.records.parts.scan() == {}


async def test_many_forks_come_all_or_none_and_their_moment_passes() -> None:
    async with living(memory=4 * GIB) as life:
        await running(life)
        made = await fork(life, count=3, name="f")
        assert sorted([(await life.engine.views.vm(id_)).name for id_ in made]) == ["f-1", "f-2", "f-3"]
        await life.reap()
        assert await named(life) == {}
        with pytest.raises(MicaError) as caught:
            await forking.fork(life.engine, "a", VmFork(count=40, name="g"), by=BY)
        assert caught.value.code is Code.INSUFFICIENT_MEMORY
        await life.rest()
        await life.advance(1.0)
        assert {row.value.name for row in (await life.records.vms.scan()).values()} == {"a", "f-1", "f-2", "f-3"}
        assert await state(life) is VmState.RUNNING
        with pytest.raises(MicaError) as caught:
            await forking.fork(life.engine, "a", VmFork(count=0), by=BY)
        assert caught.value.code is Code.INVALID


async def test_a_vm_whose_memory_was_frozen_may_write_all_of_it_anew() -> None:
    """The group stays charged for what is an image now."""
    async with living() as life:
        vm_id = await running(life)
        spec = (await life.engine.views.vm("a")).spec
        first = life.rig.world.slices[vm_id].memory
        assert first is not None
        await fork(life)
        assert life.rig.world.slices[vm_id].memory == first + spec.memory
        await do(life, "vm.set", "a", VmSet(cpu_limit=0.5))
        assert life.rig.world.slices[vm_id].memory == first + spec.memory
        await do(life, "vm.restart", "a", VmStop(force=True))
        assert life.rig.world.slices[vm_id].memory == first


async def test_a_fork_whose_daemon_died_finds_the_memory_that_only_its_parent_has() -> None:
    """It was never written to disk, and its parent's QEMU is slow to answer the next daemon."""
    async with Rig() as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(1.0)
            await running(life)
            write(life, "a", "word")
            rig.world.faults.hang("hypervisor.launch", call=2)  # the first is its parent's own, as the image's child
            await forking.fork(life.engine, "a", VmFork(name="f"), by=BY)
            await life.advance(1.0)
        rig.world.faults.clear()
        rig.world.faults.slow("hypervisor.attach", 5.0)
        async with rig.life() as life:
            await life.rest()
            assert await state(life, "f") is VmState.RUNNING
            assert has(life, "f")[0] == ["word"]


async def test_an_agent_that_never_answers_is_told_and_the_fork_runs() -> None:
    async with living() as life:
        await running(life)
        life.rig.world.faults.hang("identity.first")
        accepted = await forking.fork(life.engine, "a", VmFork(name="b"), by=BY)
        ended = await life.finish(accepted.operations[0].id)
        # Whoever it is, nobody ever sees it as its parent: without an end to the question there is no fork.
        assert ended.state is OperationState.FAILED
        assert ended.problem is not None
        assert ended.problem.code is Code.TIMEOUT
        life.rig.world.faults.clear()
        life.rig.world.process("a").close_agent()
        await life.advance(1.0)
        await fork(life, name="c")
        assert await state(life, "c") is VmState.RUNNING


async def test_a_guest_that_powers_off_while_it_is_captured_is_settled() -> None:
    async with living() as life:
        await running(life)
        life.rig.world.faults.do("machine.pause", lambda: life.rig.world.process("a").power_off())
        ended = await life.run("snapshot.create", "a", Take(name="s"))
        await life.advance(1.0)
        assert ended.state is OperationState.FAILED
        assert await state(life) is VmState.STOPPED
        assert await named(life) == {}


async def test_a_reboot_of_the_host_loses_no_complete_snapshot() -> None:
    async with living() as life:
        await running(life)
        write(life, "a", "one")
        snapshot = await take(life, "s")
        life.rig.world.reboot()
        await life.rest()
        await life.advance(5.0)
        assert await state(life) is VmState.CRASHED
        await do(life, "snapshot.restore", "a", Revert(snapshot=snapshot.id))
        assert has(life, "a") == both("one")


async def test_a_copy_is_the_same_machine_until_it_is_changed() -> None:
    async with living() as life:
        await running(life)
        snapshot = await take(life, "s")
        for change in ({"memory": Bytes(GIB)}, {"cpus": 3}, {"image": "micro"}, {"nics": ()}):
            await refused(life, Code.INVALID, "vm.create", "", VmCreate(snapshot=snapshot.id, start=True, **change))
        error = await refused(life, Code.NOT_FOUND, "vm.create", "", VmCreate(snapshot="nothing", start=True))
        assert "mica snapshot list" in error.hint


async def test_a_long_series_is_bounded_and_each_has_its_moment() -> None:
    """A guest that writes a tenth of its RAM between any two: without folding the tenth has all of it anew."""
    tenth = 52 * MIB
    async with living() as life:
        await running(life, memory=Bytes(512 * MIB))
        process = life.rig.world.process("a")
        behaviour = replace(process.behaviour, word=tenth, touched=0.5)
        life.rig.world.default = process.behaviour = behaviour
        words, written, images = [], 0, set()
        for number in range(14):
            write(life, "a", f"w{number}")
            words.append(f"w{number}")
            ended = await do(life, "snapshot.create", "a", Take(name=f"s{number}"))
            written += ended.result["expected"]["size"]
            memory = (await life.records.snapshots.need(ended.result["id"])).value.memory
            assert memory is not None
            images.add(memory.ram)
            assert ended.result["changed"] <= 128 * MIB + MIB
        assert 3 <= len(images) <= 10
        # Written down each time, what had changed since the first would be 45 tenths, then all four times: 9 * 512 MiB.
        assert written < 7 * 512 * MIB
        for number in (1, 2, 3, 6, 13):
            snapshot = (await named(life))[f"s{number}"]
            await do(life, "snapshot.restore", "a", Revert(snapshot=snapshot.id))
            assert has(life, "a") == both(*words[: number + 1])


async def test_the_moment_of_a_fork_and_a_full_host_do_not_fold() -> None:
    async with living() as life:
        await running(life, memory=Bytes(512 * MIB))
        first = await take(life, "one")
        process = life.rig.world.process("a")
        life.rig.world.default = process.behaviour = replace(process.behaviour, changes=400 * MIB)
        await fork(life)
        assert first.memory is not None
        assert (await runtime_ram(life)) == first.memory.ram
        life.rig.world.host_used = life.rig.world.memory - GIB
        second = await take(life, "two")
        assert second.memory is not None
        assert second.memory.ram == first.memory.ram


async def runtime_ram(life: Life) -> str:
    vm_id = life.rig.world.process("a").vm_id
    runtime = (await life.records.statuses.need(vm_id)).value.runtime
    assert runtime is not None
    return runtime.ram
