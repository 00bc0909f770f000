"""Suspending, going on, giving up: on a simulated host, with what was in memory and on disk."""

from __future__ import annotations

from typing import Any

import pytest

from mica.engine.definition import NoParams
from mica.engine.forking import fork
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code, MicaError
from mica.model.image import MicroRecipe
from mica.model.operation import Operation, OperationState
from mica.model.snapshot import PartKind, SnapshotKind
from mica.model.units import MIB, Bytes
from mica.model.views import ImageMake, VmCreate, VmDelete, VmFork, VmSet, VmStart, VmStop
from mica.model.vm import Power, VmState, VmStatus
from mica.testing.harness import BY, Life, Rig
from tests.engine.scenarios import DISK

CREATE = VmCreate(name="a", image="micro", disks=(DISK,))


async def do(life: Life, verb: str, target: str, params: Any = NoParams()) -> Operation:  # noqa: B008
    operation = await life.run(verb, target, params)
    assert operation.state is OperationState.SUCCEEDED, operation.problem
    return operation


async def running(life: Life, body: VmCreate = CREATE) -> str:
    """A running VM that has something in memory."""
    await do(life, "image.make", "", ImageMake(MicroRecipe()))
    vm_id = (await do(life, "vm.create", "", body)).target.partition("/")[2]
    await do(life, "vm.start", "a", VmStart())
    await life.advance(2.0)
    life.rig.world.process("a").memory.append("one")
    return vm_id


async def status(life: Life, vm_id: str) -> VmStatus:
    return (await life.records.statuses.need(vm_id)).value


async def refused(life: Life, verb: str, params: Any = NoParams()) -> MicaError:  # noqa: B008
    with pytest.raises(MicaError) as caught:
        await life.submit(verb, "a", params)
    assert caught.value.hint
    return caught.value


async def test_a_suspended_vm_goes_on_where_it_was_after_the_host_was_off() -> None:
    async with Rig() as rig:
        async with rig.life() as life:
            vm_id = await running(life)
            disks = dict(rig.world.process("a").disks)
            await do(life, "vm.suspend", "a")
            seen = await status(life, vm_id)
            assert (seen.observed.state, seen.observed.reason) == (VmState.SUSPENDED, "its memory is on disk")
            assert seen.runtime is None
            assert (await life.records.vms.need(vm_id)).value.intent is Power.SUSPENDED
            assert (await life.records.read_ledger()).value.reserved == {}, "its memory is for others now"
            assert (await life.engine.views.snapshots("a")).items == ()
        rig.world.reboot()
        async with rig.life() as life:
            operation = await do(life, "vm.resume", "a")
            assert operation.verb == "vm.start"
            process = rig.world.process("a")
            assert process.memory == ["one"]
            assert process.disks == disks, "nothing was made of its disks"
            assert (await status(life, vm_id)).suspended is None
            assert await life.records.snapshots.scan() == {}
            await life.advance(70.0)
            kinds = {row.value.kind for row in (await life.records.parts.scan()).values()}
            assert kinds == {PartKind.RAM}, "what it maps stays, the rest goes"
        assert await rig.lies() == []


async def test_a_vm_may_be_suspended_again_and_again() -> None:
    async with Rig() as rig, rig.life() as life:
        await running(life)
        for word in ("two", "three", "four"):
            await do(life, "vm.suspend", "a")
            await do(life, "vm.start", "a", VmStart())
            rig.world.process("a").memory.append(word)
        assert rig.world.process("a").memory == ["one", "two", "three", "four"]
        await life.advance(70.0)
        assert await rig.lies() == []


async def test_what_would_part_memory_and_disks_is_refused_with_the_way_out() -> None:
    async with Rig() as rig, rig.life() as life:
        await running(life)
        await do(life, "vm.suspend", "a")
        for verb, params in (
            ("vm.stop", VmStop()),
            ("vm.restart", VmStop()),
            ("vm.pause", NoParams()),
            ("vm.delete", VmDelete()),
            ("vm.purge", VmDelete(purge=True)),
            ("snapshot.create", Take()),
            ("vm.set", VmSet(memory=Bytes(512 * MIB))),
            ("vm.set", VmSet(cpus=2)),
        ):
            assert (await refused(life, verb, params)).code is Code.STATE_CONFLICT, verb
        await do(life, "vm.set", "a", VmSet(labels={"x": "y"}, autostart=True))
        (saved,) = (await life.records.snapshots.scan()).values()
        with pytest.raises(MicaError, match="suspended"):
            await life.submit("snapshot.delete", saved.value.id, NoParams())
        with pytest.raises(MicaError, match="suspended"):
            await life.submit("vm.create", "", VmCreate(snapshot=saved.value.id))
        with pytest.raises(MicaError):
            await fork(life.engine, "a", VmFork(), by=BY)
        assert await rig.lies() == []


async def test_what_was_set_before_waits_for_a_start_that_begins_anew() -> None:
    async with Rig() as rig, rig.life() as life:
        vm_id = await running(life)
        await do(life, "vm.set", "a", VmSet(memory=Bytes(512 * MIB)))
        await do(life, "vm.suspend", "a")
        assert (await life.engine.views.vm("a")).pending == ("memory",)
        await do(life, "vm.start", "a", VmStart())
        assert rig.world.process("a").plan.vm.spec.memory == 256 * MIB
        assert (await life.records.vms.need(vm_id)).value.spec.memory == 512 * MIB
        assert (await life.engine.views.vm("a")).pending == ("memory",)
        await do(life, "vm.suspend", "a")
        await do(life, "vm.discard", "a")
        await do(life, "vm.start", "a", VmStart())
        assert rig.world.process("a").memory == []
        assert rig.world.process("a").plan.vm.spec.memory == 512 * MIB


async def test_requests_that_wait_behind_a_suspend_know_where_it_leads() -> None:
    async with Rig() as rig, rig.life() as life:
        await running(life)
        asleep = await life.submit("vm.suspend", "a", NoParams())
        assert (await refused(life, "vm.stop", VmStop())).code is Code.STATE_CONFLICT
        awake = await life.submit("vm.resume", "a", NoParams())
        assert (await life.finish(asleep.id)).state is OperationState.SUCCEEDED
        assert (await life.finish(awake.id)).state is OperationState.SUCCEEDED
        assert rig.world.process("a").memory == ["one"]
        assert await rig.lies() == []


async def test_a_paused_start_holds_the_machine_where_it_was() -> None:
    async with Rig() as rig, rig.life() as life:
        vm_id = await running(life)
        await do(life, "vm.suspend", "a")
        await do(life, "vm.start", "a", VmStart(paused=True))
        assert (await status(life, vm_id)).observed.state is VmState.PAUSED
        assert rig.world.process("a").memory == ["one"]
        await do(life, "vm.resume", "a")
        assert (await status(life, vm_id)).observed.state is VmState.RUNNING


async def test_damaged_memory_is_seen_before_the_guest_runs_on_it() -> None:
    async with Rig() as rig, rig.life() as life:
        vm_id = await running(life)
        await do(life, "vm.suspend", "a")
        for row in (await life.records.parts.scan()).values():
            if row.value.kind is PartKind.DEVICES:
                rig.world.storage.parts[row.value.id].damage = "a bit"
        failed = await life.run("vm.start", "a", VmStart())
        assert failed.problem is not None
        assert failed.problem.code is Code.CORRUPT
        assert "--discard" in failed.problem.hint
        assert (await status(life, vm_id)).observed.state is VmState.SUSPENDED
        assert rig.world.processes == {}
        await do(life, "vm.discard", "a")
        await do(life, "vm.start", "a", VmStart())
        assert await rig.lies() == []


async def test_a_start_that_fails_leaves_it_suspended() -> None:
    async with Rig() as rig, rig.life() as life:
        vm_id = await running(life)
        await do(life, "vm.suspend", "a")
        for port in ("hypervisor.launch", "machine.load", "machine.join"):
            rig.world.faults.fail(port)
            failed = await life.run("vm.start", "a", VmStart())
            assert failed.state is OperationState.FAILED, port
            assert (await status(life, vm_id)).observed.state is VmState.SUSPENDED, port
            assert await rig.lies() == []
        await do(life, "vm.start", "a", VmStart())
        assert rig.world.process("a").memory == ["one"]


async def test_a_suspend_that_is_cancelled_lets_it_run_on() -> None:
    async with Rig() as rig, rig.life() as life:
        vm_id = await running(life)
        rig.world.faults.hang("ram.save")
        asked = await life.submit("vm.suspend", "a", NoParams())
        await life.advance(1.0)
        assert (await status(life, vm_id)).observed.reason == "it is being suspended"
        await life.engine.cancel(asked.id, by=BY)
        assert (await life.finish(asked.id)).state is OperationState.CANCELLED
        assert (await status(life, vm_id)).observed.state is VmState.RUNNING
        assert rig.world.storage.parts == {}
        assert await life.records.parts.scan() == {}
        assert rig.world.process("a").memory == ["one"]
        await life.advance(70.0)
        assert await rig.lies() == []


async def test_a_fork_can_be_suspended_while_its_parent_goes_on() -> None:
    async with Rig() as rig, rig.life() as life:
        await running(life)
        await fork(life.engine, "a", VmFork(name="b"), by=BY)
        await life.rest()
        rig.world.process("b").memory.append("b's own")
        await do(life, "vm.suspend", "b")
        rig.world.process("a").memory.append("a's own")
        await do(life, "vm.stop", "a", VmStop(force=True))
        await life.advance(70.0)
        await do(life, "vm.start", "b", VmStart())
        assert rig.world.process("b").memory == ["one", "b's own"]
        await life.advance(70.0)
        assert await rig.lies() == []


async def test_after_a_boot_of_the_host_a_suspended_vm_with_autostart_goes_on() -> None:
    async with Rig() as rig:
        async with rig.life() as life:
            await running(life, VmCreate(name="a", image="micro", disks=(DISK,), autostart=True))
            await do(life, "vm.suspend", "a")
        rig.world.reboot()
        async with rig.life() as life:
            await life.advance(10.0)
            await life.rest()
            assert rig.world.process("a").memory == ["one"]
        assert await rig.lies() == []


async def test_its_memory_is_told_apart_from_snapshots() -> None:
    async with Rig() as rig, rig.life() as life:
        await running(life)
        before = (await life.engine.views.vm("a")).snapshot
        await do(life, "vm.suspend", "a")
        (seen,) = (await life.engine.views.snapshots("a", forks=True)).items
        assert (seen.snapshot.kind, seen.complete, seen.snapshot.disks) == (SnapshotKind.SUSPEND, True, {})
        assert (await life.engine.views.vm("a")).snapshot == before


async def test_memory_that_is_found_damaged_while_the_guest_runs_has_it_paused() -> None:
    async with Rig() as rig, rig.life() as life:
        vm_id = await running(life)
        await do(life, "vm.suspend", "a")
        for row in (await life.records.parts.scan()).values():
            if row.value.kind is PartKind.RAM:
                rig.world.storage.parts[row.value.id].damage = "a bit"
        await do(life, "vm.start", "a", VmStart())
        await life.advance(70.0)
        await life.rest()
        seen = (await status(life, vm_id)).observed
        assert seen.state is VmState.PAUSED
        assert seen.problem is not None
        assert seen.problem.code is Code.CORRUPT
