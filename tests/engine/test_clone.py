"""Clones of stopped VMs: linked, full, of snapshots; who they become."""

from __future__ import annotations

from typing import Any

import pytest

from mica.engine.forking import clone
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmClone, VmCreate, VmDelete, VmStart, VmStop, VmView
from mica.model.vm import DiskSpec, VmState
from mica.testing.harness import BY, Life
from tests.engine.worlds import create, do, living

DISK = DiskSpec(name="data", size=Bytes(GIB))


async def copy(life: Life, ref: str, **how: Any) -> VmView:
    accepted = await clone(life.engine, ref, VmClone(**how), by=BY)
    operation = await life.finish(accepted.operations[0].id)
    assert operation.state is OperationState.SUCCEEDED, operation.problem
    return await life.engine.views.vm(operation.target.partition("/")[2])


async def written(life: Life, word: str = "one") -> VmView:
    """A stopped VM that has written to its disk."""
    vm = await create(life, "a", disks=(DISK,))
    write(life, vm, word)
    return vm


def write(life: Life, vm: VmView, word: str) -> None:
    storage = life.rig.world.storage
    storage.there[life.rig.world.volumes[vm.id]["data"].path].write(word)


def read(life: Life, vm: VmView) -> tuple[str, ...]:
    return life.rig.world.storage.read(life.rig.world.volumes[vm.id]["data"].path)


@pytest.mark.parametrize("full", [False, True])
async def test_a_clone_has_what_the_original_had_and_goes_its_own_way(full: bool) -> None:
    async with living() as life:
        original = await written(life)
        made = await copy(life, "a", full=full)
        assert (made.name, made.observed.state, made.forked_from) == ("a-clone-1", VmState.STOPPED, "a")
        assert made.spec.nics[0].mac != original.spec.nics[0].mac
        assert made.spec.hostname == "a-clone-1"
        write(life, original, "a's")
        write(life, made, "clone's")
        assert (read(life, original), read(life, made)) == (("one", "a's"), ("one", "clone's"))
        await life.advance(70.0)
        assert await life.records.snapshots.scan() == {}, "the moment of the clone goes"
        assert read(life, made) == ("one", "clone's")


async def test_a_full_clone_needs_nothing_of_the_original() -> None:
    async with living() as life:
        await written(life)
        made = await copy(life, "a", full=True, name="b")
        assert (await life.records.vms.need(made.id)).value.layers == {}
        await do(life, "vm.purge", "a", VmDelete(purge=True))
        await life.advance(70.0)
        assert life.rig.world.storage.parts == {}
        await do(life, "vm.start", "b", VmStart())
        assert read(life, made) == ("one",)


async def test_a_linked_clone_keeps_what_it_lies_over() -> None:
    async with living() as life:
        await written(life)
        made = await copy(life, "a", name="b")
        await do(life, "vm.purge", "a", VmDelete(purge=True))
        await life.advance(70.0)
        assert len(life.rig.world.storage.parts) == 1
        assert read(life, made) == ("one",)


async def test_a_vm_that_runs_is_not_cloned_and_the_ways_out_are_told() -> None:
    async with living() as life:
        await written(life)
        await do(life, "snapshot.create", "a", Take(name="before"))
        await do(life, "vm.start", "a", VmStart())
        with pytest.raises(MicaError) as caught:
            await clone(life.engine, "a", VmClone(), by=BY)
        assert caught.value.code is Code.STATE_CONFLICT
        assert all(way in caught.value.hint for way in ("mica fork a", "stop", "--snapshot"))
        assert read(life, await copy(life, "a", snapshot="before")) == ("one",)


async def test_a_clone_can_be_asked_for_while_its_vm_is_being_stopped() -> None:
    async with living() as life:
        await written(life)
        await do(life, "vm.start", "a", VmStart())
        await life.submit("vm.stop", "a", VmStop(force=True))
        await copy(life, "a")


async def test_a_clone_that_comes_to_nothing_leaves_the_original_as_it_was() -> None:
    async with living() as life:
        original = await written(life)
        life.rig.world.faults.fail("volumes.copy", MicaError(Code.INSUFFICIENT_DISK, "no room"))
        accepted = await clone(life.engine, "a", VmClone(full=True), by=BY)
        failed = await life.finish(accepted.operations[0].id)
        assert failed.problem is not None
        assert failed.problem.code is Code.INSUFFICIENT_DISK
        assert read(life, original) == ("one",)
        with pytest.raises(MicaError, match="there is a VM"):
            await clone(life.engine, "a", VmClone(name="a"), by=BY)
        await life.advance(70.0)
        assert [view.name for view in (await life.engine.views.vms()).items] == ["a"]


async def test_a_clone_becomes_itself_when_it_first_runs_even_if_it_did_not_at_once() -> None:
    async with living() as life:
        await written(life)
        made = await copy(life, "a", name="b")
        await do(life, "vm.start", "b", VmStart())
        await do(life, "vm.stop", "b", VmStop(force=True))
        status = (await life.records.statuses.need(made.id)).value
        assert status.becoming is not None
        assert (status.becoming.hostname, status.becoming.parent_id != made.id) == ("b", True)
        await do(life, "vm.start", "b", VmStart())
        await life.advance(30.0)
        status = (await life.records.statuses.need(made.id)).value
        assert status.becoming is None
        assert status.identity


async def test_a_full_copy_is_one_of_a_snapshot() -> None:
    async with living() as life:
        with pytest.raises(MicaError) as caught:
            await life.submit("vm.create", "", VmCreate(name="b", image="micro", full=True, memory=Bytes(256 * MIB)))
        assert caught.value.code is Code.INVALID
