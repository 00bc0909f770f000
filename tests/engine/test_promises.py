"""A fork costs what it dirties, with a reserve for what it may."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica.engine import forking
from mica.engine.admission import LEAST_RESERVE, Shared, followed, promise, reserve_of, room
from mica.engine.definition import NoParams, Policy
from mica.engine.promises import left
from mica.engine.records import Ledger, Reservation
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import VmCreate, VmDelete, VmFork, VmStart, VmStop
from mica.ports.host import Capacity
from mica.testing.harness import BY, Life, Rig
from mica.testing.simulated import Behaviour
from tests.engine.worlds import create, do, living, refused

replace = msgspec.structs.replace

SIZES = st.integers(32, 1 << 16).map(lambda n: n * MIB)
OWN = st.integers(0, 1 << 17).map(lambda n: n * MIB)
OVERHEADS = st.integers(0, 1024).map(lambda n: n * MIB)


# ── the numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(SIZES, OVERHEADS, OWN)
def test_ram_of_ones_own_is_promised_in_full(ram: int, overhead: int, own: int) -> None:
    assert promise(ram, overhead, "", own) == Reservation(Bytes(ram), Bytes(overhead))


@given(SIZES, OVERHEADS, OWN, OWN)
def test_shared_ram_is_promised_as_far_as_it_is_written_and_a_reserve(
    ram: int, overhead: int, own: int, more: int
) -> None:
    got = promise(ram, overhead, "image", own)
    full = promise(ram, overhead)
    assert (got.image, got.overhead) == ("image", overhead)
    assert got.total <= full.total
    # Either it may take all that it ever can, or it may take a reserve before it is looked at again.
    assert got.total == full.total or got.total >= own + reserve_of(ram)
    assert got.total == full.total or got.ram >= min(ram, max(LEAST_RESERVE, ram // 4))
    assert promise(ram, overhead, "image", own + more).total >= got.total


@given(SIZES, OVERHEADS, OWN, OWN)
def test_a_promise_is_written_only_when_it_changes_by_a_real_amount(
    ram: int, overhead: int, before: int, own: int
) -> None:
    held, due = promise(ram, overhead, "image", before), promise(ram, overhead, "image", own)
    got = followed(held, due, ram)
    assert got in (held, due)
    assert abs(got.ram - due.ram) < reserve_of(ram) // 4 or got == due
    assert followed(got, due, ram) == got, "what was written is not written again"
    other = promise(ram, overhead, "another", before)
    assert followed(other, due, ram) == due
    assert followed(None, due, ram) == due
    assert followed(promise(ram, overhead), due, ram) == due


def test_images_are_counted_beside_the_promises() -> None:
    capacity = Capacity(4, Bytes(8 * GIB), Bytes(7 * GIB), Bytes(GIB))
    ledger = Ledger({"a": promise(GIB, 100 * MIB, "image")})
    left = room(capacity, ledger, [], 512 * MIB, Shared(resident=GIB, missing=2 * GIB))
    own = 100 * MIB + 256 * MIB
    assert left.promised == 8 * GIB - 512 * MIB - own - 3 * GIB
    # What is in memory is not available any more; what is yet to come is.
    assert left.free == 7 * GIB - 512 * MIB - own - 2 * GIB


# ── a host ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# A VM of 256 MiB takes 328 MiB with its QEMU, of which its guest touches 128 MiB; nine of them fit beside the reserve
# of 512 MiB. A fork is promised 136 MiB.
FULL, FORK, TOUCHED = 328 * MIB, 136 * MIB, 128 * MIB
HOST: dict[str, Any] = {"memory": 3600 * MIB, "host_used": 0}


async def promised(life: Life, name: str) -> Reservation:
    vm_id = await life.records.resolve_vm(name)
    return (await life.records.read_ledger()).value.reserved[vm_id]


async def fork(life: Life, count: int) -> None:
    """Forks ``f-1`` … of VM ``a``, which is made first."""
    await create(life, "a", start=True)
    await life.advance(2.0)
    accepted = await forking.fork(life.engine, "a", VmFork(count=count, name="f" if count > 1 else "f-1"), by=BY)
    for operation in accepted.operations:
        ended = await life.finish(operation.id)
        assert ended.state is OperationState.SUCCEEDED, ended.problem


def dirty(rig: Rig, name: str, changes: int) -> None:
    process = rig.world.process(name)
    process.behaviour = replace(process.behaviour, changes=changes)


async def test_more_than_twice_as_many_forks_run_as_whole_vms_fit() -> None:
    async with living(**HOST) as life:
        for n in range(9):
            await create(life, f"v{n}", start=True)
            await life.advance(6.0)
        await refused(life, Code.INSUFFICIENT_MEMORY, "vm.create", "", VmCreate(image="micro", start=True))
    async with living(**HOST) as life:
        await fork(life, 20)
        each = [await promised(life, name) for name in ("a", *(f"f-{n}" for n in range(1, 21)))]
        assert {r.total for r in each} == {FORK}
        assert len({r.image for r in each} - {""}) == 1, "all of them, and the one that was forked, share one image"
        await life.advance(20.0)
        assert (await left(life.engine.env)).promised == HOST["memory"] - 512 * MIB - 21 * FORK - TOUCHED
        with pytest.raises(MicaError) as caught:
            await forking.fork(life.engine, "a", VmFork(), by=BY)
        assert caught.value.code is Code.INSUFFICIENT_MEMORY
        assert "64 MiB for what it may write of its 256 MiB of RAM, 72 MiB for QEMU" in caught.value.message
        assert "--memory" not in caught.value.hint, caught.value.hint


async def test_the_promise_follows_what_is_written_and_ends_with_the_machine() -> None:
    async with living(**HOST) as life:
        await fork(life, 1)
        await life.advance(6.0)
        revision = await life.rig.store.revision()
        dirty(life.rig, "f-1", 5 * MIB)
        await life.advance(30.0)
        assert (await promised(life, "f-1")).total == FORK
        assert await life.rig.store.revision() == revision, "nothing is written for ever"
        dirty(life.rig, "f-1", 150 * MIB)
        await life.advance(6.0)
        # 32 MiB are QEMU's, so that 110 MiB are beyond the 72 MiB that are promised for that in any case.
        assert (await promised(life, "f-1")).ram == (110 + 64) * MIB
        view = await life.engine.views.vm("f-1")
        assert (view.usage.own, view.usage.promised) == (182 * MIB, (72 + 110 + 64) * MIB)
        assert view.usage.shared == TOUCHED
        dirty(life.rig, "f-1", 256 * MIB)
        await life.advance(6.0)
        assert (await promised(life, "f-1")).total == FULL, "never more than all of it"
        dirty(life.rig, "f-1", 0)  # a balloon
        await life.advance(6.0)
        assert (await promised(life, "f-1")).total == FORK
        await do(life, "vm.stop", "f-1", VmStop())
        assert len((await life.records.read_ledger()).value.reserved) == 1


async def test_the_next_daemon_keeps_the_promises() -> None:
    async with Rig(**HOST) as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            await fork(life, 2)
            dirty(rig, "f-2", 150 * MIB)
            await life.advance(6.0)
            before = (await life.records.read_ledger()).value
            room = await left(life.engine.env)
        assert before.reserved[await rig.records.resolve_vm("f-2")].ram == 174 * MIB
        async with rig.life() as life:
            await life.advance(0.1)
            for loop in life.engine.loops:
                if loop.name == "ledger":
                    await loop.once()
            assert (await life.records.read_ledger()).value == before
            await life.advance(60.0)
            assert (await life.records.read_ledger()).value == before
            assert await left(life.engine.env) == room
        assert await rig.lies() == []


async def test_what_boots_after_a_stop_needs_all_of_its_memory_again() -> None:
    async with living(**HOST) as life:
        await fork(life, 20)
        await life.advance(6.0)
        await refused(life, Code.INSUFFICIENT_MEMORY, "vm.restart", "f-1", VmStop())
        await do(life, "vm.stop", "f-1", VmStop())
        error = await refused(life, Code.INSUFFICIENT_MEMORY, "vm.start", "f-1", VmStart())
        assert "256 MiB of RAM" in error.message
        await do(life, "vm.stop", "f-2", VmStop())
        await do(life, "vm.start", "f-1", VmStart())
        assert await promised(life, "f-1") == Reservation(Bytes(256 * MIB), Bytes(72 * MIB))


async def test_an_image_that_only_one_machine_maps_is_free_when_that_boots() -> None:
    async with living(memory=512 * MIB + FULL + FORK, host_used=0) as life:
        await fork(life, 1)
        await do(life, "vm.purge", "f-1", VmDelete(purge=True, force=True))
        await life.advance(6.0)
        # What is left would not hold a whole VM beside the image and the VM that shares it with nobody any more.
        assert (await left(life.engine.env)).promised == FULL + FORK - FORK - TOUCHED
        await do(life, "vm.restart", "a", VmStop())
        assert await promised(life, "a") == Reservation(Bytes(256 * MIB), Bytes(72 * MIB))


async def test_what_goes_on_in_a_memory_on_disk_is_promised_that_memory_once() -> None:
    async with living(memory=512 * MIB + FULL + 100 * MIB, host_used=0) as life:
        await create(life, "a", start=True)
        await life.advance(2.0)
        await do(life, "vm.suspend", "a", NoParams())
        assert (await life.records.read_ledger()).value.reserved == {}
        await do(life, "vm.start", "a", VmStart())
        held = await promised(life, "a")
        assert (held.total, bool(held.image)) == (FORK, True)


async def test_what_has_to_boot_after_all_is_judged_anew() -> None:
    """The state that its image had booted to is found damaged when it is about to begin there."""
    policy = Policy(boot_space=4 * GIB)
    async with living(policy, memory=4 * GIB) as life:
        life.rig.world.default = Behaviour(agent_after_s=1.0)
        await create(life, "first", start=True)
        await life.advance(60.0)
        (state,) = [row.value for row in (await life.records.snapshots.scan()).values()]
        assert state.memory is not None
        life.rig.world.storage.parts[state.memory.devices].damage = "a flipped bit"
        # Of what is left a VM that begins there may have its part, and one that boots not.
        free = await left(life.engine.env)
        life.rig.world.memory -= free.promised - TOUCHED - FORK - 10 * MIB
        life.rig.world.host_used = 0
        failed = await life.run("vm.create", "", VmCreate(name="b", image="micro", start=True))
        assert failed.problem is not None
        assert failed.problem.code is Code.INSUFFICIENT_MEMORY
        again = await life.run("vm.create", "", VmCreate(name="b", image="micro", start=True, overcommit=True))
        assert again.state is OperationState.SUCCEEDED
