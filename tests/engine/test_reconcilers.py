"""The loops: each does its work, does it once, and can be killed anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mica.engine.definition import NoParams, Policy
from mica.engine.reconcilers import LIST_S, RETRY_S, ROUND_S, Loop, guests
from mica.engine.records import Draft, Ledger, Reservation
from mica.model.errors import Code, MicaError
from mica.model.operation import OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import UsageSource, VmCreate, VmDelete, VmRestore, VmSet, VmStart, VmStop
from mica.model.vm import DiskSpec, VmState
from mica.testing.harness import Life, Rig
from mica.testing.simulated import Behaviour
from mica.testing.store_faults import Fault, When, io_error
from tests.engine.worlds import create, do, living, refused

DISK = DiskSpec(name="data", size=Bytes(GIB))


def loop(life: Life, name: str) -> Loop:
    return next(found for found in life.engine.loops if found.name == name)


async def once(life: Life, name: str) -> str:
    """One round, after which another finds nothing to do; returns what the first said."""
    wanted = loop(life, name)
    await wanted.once()
    assert wanted.status.failed == ""
    said = wanted.status.said
    await life.rest()
    before = await life.rig.store.revision()
    await wanted.once()
    assert wanted.status.said == ""
    assert await life.rig.store.revision() == before
    return said


async def test_a_loop_that_fails_says_so_and_goes_on() -> None:
    async with living() as life:
        life.rig.world.faults.fail("images.present", MicaError(Code.INTERNAL, "no such directory"))
        images = loop(life, "images")
        await images.once()
        assert (images.status.failed, images.status.said) == ("no such directory", "")
        life.rig.world.faults.fail("images.present", OSError(5, "Input/output error"))
        await images.once()
        assert images.status.failed == "OSError: [Errno 5] Input/output error"
        await images.once()
        assert images.status.failed == ""


async def test_a_round_that_hangs_ends() -> None:
    async with living() as life:
        leftovers = loop(life, "leftovers")
        life.rig.world.faults.hang("volumes.owners")
        await life.advance(ROUND_S + 10.0)
        assert "10m" in leftovers.status.failed
        await life.advance(310.0)
        assert leftovers.status.failed == ""


# ── autostart ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_round_that_failed_is_tried_again_soon(hangs: bool) -> None:
    """A home with an image that no row names yet, and a disk that does not answer the first look."""
    async with Rig() as rig:
        rig.world.add_image("micro")
        if hangs:
            rig.world.faults.hang("images.present")
        else:
            rig.world.faults.fail("images.present", OSError(5, "Input/output error"))
        async with rig.life() as life:
            await life.advance((LIST_S if hangs else 0.0) + RETRY_S + 1.0)
            assert len(await rig.records.images.scan()) == 1


async def test_autostart_is_for_boots_of_the_host_and_not_for_restarts_of_the_daemon() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", autostart=True)
            await create(life, "b")
        async with rig.life() as life:
            await life.advance(60.0)
            assert rig.world.processes == {}
        rig.world.reboot()
        async with rig.life() as life:
            await life.advance(1.0)
            await life.rest()
            assert [p.plan.vm.name for p in rig.world.processes.values()] == ["a"]
            await do(life, "vm.stop", "a", VmStop())
            await life.advance(60.0)
            assert rig.world.processes == {}
        assert await rig.lies() == []


async def test_autostart_waits_until_it_is_seen_what_the_boot_took_down() -> None:
    """A VM that ran when the host went down is shown as running until its actor has looked."""
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", autostart=True, start=True)
        rig.world.reboot()
        rig.world.faults.slow("hypervisor.attach", 3.0, call=1)
        async with rig.life() as life:
            await life.advance(2.0)
            assert (await life.engine.views.vm("a")).observed.state is VmState.RUNNING
            await life.advance(10.0)
            await life.rest()
            assert (await life.engine.views.vm("a")).observed.state is VmState.RUNNING
            assert len(rig.world.processes) == 1
        assert await rig.lies() == []


async def test_autostart_starts_each_once_though_the_daemon_dies_in_the_middle() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            for name in "abc":
                await create(life, name, autostart=True)
        rig.world.reboot()
        async with rig.life() as life:
            rig.world.faults.do("hypervisor.launch", lambda: setattr(life.store, "crashed", True))
            await life.advance(5.0)
        assert rig.crashes == 1
        async with rig.life() as life:
            await life.advance(5.0)
            await life.rest()
            starts = [o for o in (await life.engine.views.operations()).items if o.verb == "vm.start"]
            assert sorted(o.target_name for o in starts) == ["a", "b", "c"]
        assert len(rig.world.processes) == 3
        assert await rig.lies() == []


async def test_autostart_tells_what_it_could_not_start() -> None:
    async with Rig(memory=2 * GIB, host_used=256 * MIB) as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "big", autostart=True, memory=Bytes(8 * GIB))
            await create(life, "small", autostart=True)
        rig.world.reboot()
        async with rig.life() as life:
            await life.advance(1.0)
            said = loop(life, "autostart").status.said
            assert "started 1 VMs" in said
            assert "not started: big: big needs 8.1 GiB" in said


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_images_are_adopted_and_missed() -> None:
    async with living() as life:
        other = life.rig.world.add_image("other")
        assert await once(life, "images") == "adopted 1 images"
        assert (await life.engine.views.image("other")).image == other
        del life.rig.world.images[other.digest]
        assert await once(life, "images") == "1 images lost their files"
        assert (await life.engine.views.image("other")).damaged == "its files are missing"
        await do(life, "image.delete", "other", NoParams())


async def test_an_image_that_is_deleted_while_the_loop_looks_is_not_adopted() -> None:
    async with living() as life:
        life.rig.world.faults.slow("images.present", 5.0, call=1)
        # It has listed nothing yet; then the image goes, files and row, and what it lists is what there is.

        round_ = asyncio.create_task(loop(life, "images").once())
        await life.quiet()
        operation = await life.submit("image.delete", "micro", NoParams())
        await life.advance(10.0)
        await round_
        assert (await life.finish(operation.id)).state is OperationState.SUCCEEDED
        assert (await life.engine.views.images()).items == ()


# ── leftovers, ledger ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_leftovers_of_nobody_are_removed_and_those_of_vms_are_not() -> None:
    async with living() as life:
        await create(life, "a", start=True, disks=(DISK,))
        kept = life.rig.world.holdings()
        stranger = "00000000-0000-0000-0000-000000000001"
        life.rig.world.volumes[stranger] = dict(next(iter(life.rig.world.volumes.values())))
        life.rig.world.logs.add(stranger)
        assert await once(life, "leftovers") == "removed leftovers of 00000000"
        assert life.rig.world.holdings() == kept


async def test_leftovers_of_each_kind_are_found_alone() -> None:
    """A VM's row may be gone with only one of its things left: a network directory, a control group."""
    async with living() as life:
        await create(life, "a", start=True, disks=(DISK,))
        world, kept = life.rig.world, life.rig.world.holdings()
        owner = next(iter(world.volumes))
        leave: list[Callable[[str], object]] = [
            lambda id_: world.networks.update({(id_, "net0"): world.networks[owner, "net0"]}),
            lambda id_: world.slices.update({id_: world.slices[owner]}),
            lambda id_: world.volumes.update({id_: dict(world.volumes[owner])}),
            lambda id_: world.logs.add(id_),
        ]
        for number, one in enumerate(leave):
            one(f"{number:08}-0000-0000-0000-000000000001")
            assert await once(life, "leftovers") == f"removed leftovers of {number:08}"
            assert world.holdings() == kept
        assert await once(life, "leftovers") == ""


async def test_a_leftover_that_resists_does_not_keep_the_others() -> None:
    async with living() as life:
        await create(life, "a", start=True, disks=(DISK,))
        world, kept = life.rig.world, life.rig.world.holdings()
        owner = next(iter(world.volumes))
        for number in range(3):
            world.volumes[f"{number:08}-0000-0000-0000-000000000001"] = dict(world.volumes[owner])
        world.faults.fail("volumes.remove", MicaError(Code.IN_USE, "somebody has it open"), call=2)
        leftovers = loop(life, "leftovers")
        await leftovers.once()
        assert leftovers.status.said == (
            "removed leftovers of 00000000, 00000002; not removed: 00000001: somebody has it open"
        )
        assert await once(life, "leftovers") == "removed leftovers of 00000001"
        assert world.holdings() == kept


async def test_leftovers_of_a_vm_that_is_being_made_are_left_alone() -> None:
    async with living() as life:
        life.rig.world.faults.slow("volumes.create", 5.0, call=2)
        two = (DISK, DiskSpec(name="more", size=Bytes(GIB)))
        made = await life.submit("vm.create", "", VmCreate(name="a", image="micro", disks=two))
        await life.advance(1.0)
        await loop(life, "leftovers").once()
        assert (await life.finish(made.id)).state is OperationState.SUCCEEDED


@pytest.mark.parametrize(
    "damage",
    [
        lambda right, vm_id: {},
        lambda right, vm_id: {**right, "nobody": Reservation(Bytes(GIB), Bytes(0))},
        lambda right, vm_id: {vm_id: Reservation(Bytes(GIB), Bytes(0))},
    ],
    ids=["lost", "of nobody", "wrong"],
)
async def test_the_ledger_is_corrected(damage: Callable[..., dict[str, Reservation]]) -> None:
    async with living() as life:
        vm_id = (await create(life, "a", start=True)).id
        ledger = await life.records.read_ledger()
        draft = Draft()
        wrong = Ledger(damage(ledger.value.reserved, vm_id))
        draft.put(life.records.ledger, "memory", wrong, ledger.generation)
        await life.records.commit(draft)
        assert (await once(life, "ledger")).startswith("corrected the memory of")
        assert (await life.records.read_ledger()).value == ledger.value


async def test_the_promise_of_an_accepted_start_is_not_corrected_away() -> None:
    async with living() as life:
        life.rig.world.behave("a", Behaviour(obeys_after_s=None))
        vm_id = (await create(life, "a", start=True)).id
        await life.submit("vm.stop", "a", VmStop(timeout_s=20.0))
        await life.submit("vm.start", "a", VmStart())
        for _ in range(30):
            await life.advance(1.0)
            await loop(life, "ledger").once()
            assert vm_id in (await life.records.read_ledger()).value.reserved


# ── trash, retention, actors ──────────────────────────────────────────────────────────────────────────────────────


async def test_the_trash_empties_itself_when_its_time_has_come() -> None:
    async with living(Policy(trash_s=3600.0)) as life:
        vm = await create(life, "a", disks=(DISK,))
        await do(life, "vm.delete", "a", VmDelete())
        trashed = (await life.engine.views.vms(trashed=True)).items
        assert [(v.name, v.expires_at) for v in trashed] == [("a", life.rig.clock.now() + 3600.0)]
        assert (await life.engine.views.vms()).items == ()
        await life.advance(3500.0)
        assert vm.id in life.rig.world.volumes
        await life.advance(200.0)
        assert life.rig.world.volumes == {}
        await refused(life, Code.NOT_FOUND, "vm.restore", vm.id, VmRestore())


async def test_one_vm_that_cannot_be_purged_does_not_keep_the_others() -> None:
    async with living(Policy(trash_s=60.0, inbox_capacity=8)) as life:
        for name in "ab":
            await create(life, name, disks=(DISK,))
            await do(life, "vm.delete", name, VmDelete())
        life.rig.world.faults.fail("volumes.remove", MicaError(Code.COMMAND_FAILED, "busy"))
        await life.advance(75.0)
        left = (await life.engine.views.vms(trashed=True)).items
        assert len(left) == 1
        assert left[0].observed.reason == "not fully deleted"
        assert left[0].observed.problem is not None
        await life.advance(130.0)
        assert life.rig.world.volumes == {}


async def test_a_vm_that_was_deleted_half_way_can_only_be_purged_again() -> None:
    """Its disk is gone, and the record that should go with it stays: the store fails once, anywhere."""
    halves = 0
    for commit in range(1, 12):
        async with living() as life:
            vm = await create(life, "a", disks=(DISK,))
            life.store.faults.append(Fault(life.store.commits + commit, When.BEFORE, io_error()))
            try:
                ended = await life.run("vm.purge", "a", VmDelete(purge=True))
            except MicaError:
                continue  # it was not even accepted
            assert await life.rig.lies() == []
            row = await life.records.vms.get(vm.id)
            if row is None:
                continue
            assert ended.state is OperationState.FAILED
            if vm.id in life.rig.world.volumes:
                continue
            halves += 1
            left = await life.engine.views.vm("a")
            assert (left.observed.state, left.observed.reason) == (VmState.DELETING, "not fully deleted")
            assert left.observed.problem == ended.problem
            asked = [("vm.start", VmStart()), ("vm.set", VmSet(labels={})), ("vm.delete", VmDelete())]
            for verb, params in asked:
                error = await refused(life, Code.STATE_CONFLICT, verb, "a", params)
                assert error.hint == "`mica vm delete --purge a` finishes that"
            await do(life, "vm.purge", "a", VmDelete(purge=True))
            assert await life.records.vms.get(vm.id) is None
    assert halves > 0


async def test_old_operations_and_keys_are_forgotten_and_stuck_ones_are_not() -> None:
    async with Rig(Policy(operation_retention_s=86400.0)) as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True)
            stuck = await _stuck(life)
        await rig.clock.advance(86400.0 - 30.0)
        async with rig.life() as life:
            await life.advance(25.0)
            assert len((await life.engine.views.operations()).items) == 2
            assert len(await life.records.keys.scan()) == 1
        await rig.clock.advance(60.0)
        async with rig.life() as life:
            await life.advance(25.0)
            kept = (await life.engine.views.operations()).items
            assert [o.id for o in kept] == [stuck]
            assert await life.records.keys.scan() == {}
            await life.engine.resolve(stuck, "retry", by=kept[0].by)
            await life.rest()
        assert await rig.lies() == []


async def _stuck(life: Life) -> str:
    life.rig.world.faults.fail("slices.remove", call=0)
    operation = await life.run("vm.stop", "a", VmStop(force=True), idempotency_key="k")
    assert operation.state is OperationState.STUCK
    life.rig.world.faults.clear()
    return operation.id


async def test_actors_of_vms_that_rest_are_let_go() -> None:
    async with living() as life:
        await create(life, "a")
        await create(life, "b", start=True)
        await life.advance(61.0)
        assert len(life.engine._vms) == 1
        assert life.engine._others == {}
        await do(life, "vm.start", "a", VmStart())
        assert len(life.engine.live()) == 2


async def test_a_machine_whose_end_nobody_told_is_looked_at_now_and_then() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        process = life.rig.world.process("a")
        process._listeners.clear()
        process.pause("io-error")
        await life.advance(31.0)
        assert (await life.engine.views.vm("a")).observed.state is VmState.PAUSED


async def test_what_could_not_be_put_away_is_tried_again() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        life.rig.world.faults.fail("networks.detach")
        life.rig.world.process("a").kill()
        await life.quiet()
        assert (await life.engine.views.vm("a")).observed.state is VmState.RUNNING
        await life.advance(31.0)
        assert (await life.engine.views.vm("a")).observed.state is VmState.CRASHED


async def test_facts_of_guests_are_asked_for_and_a_lying_agent_harms_nobody() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        life.rig.world.faults.fail("guests.facts", MicaError(Code.AGENT_FAILED, "no"), call=0)
        await life.advance(10.0)
        assert (await life.engine.views.vm("a")).observed.os == ""
        life.rig.world.faults.clear()
        await life.advance(4.0)
        assert (await life.engine.views.vm("a")).observed.os == "Simulated GNU/Linux 1"


async def test_a_guest_of_which_all_is_known_is_asked_now_and_then() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(5.0)
        log = life.rig.world.faults.log
        asked = log.count("guests.facts")
        assert asked == 1
        await life.advance(guests.AGAIN_S - 3.0)
        assert log.count("guests.facts") == asked
        await life.advance(6.0)
        assert log.count("guests.facts") == asked + 1
        await do(life, "vm.restart", "a", VmStop())
        await life.advance(5.0)  # another boot: nothing is known of it
        assert log.count("guests.facts") == asked + 2
        assert (await life.engine.views.vm("a")).observed.os


async def test_usage_is_sampled_and_forgotten() -> None:
    async with living() as life:
        life.rig.world.behave("a", Behaviour(cpu=0.5))
        vm_id = (await create(life, "a", start=True)).id
        await life.advance(12.0)
        usage = (await life.engine.views.vm("a")).usage
        assert usage.cpu == pytest.approx(0.5)
        assert usage.memory == life.rig.world.touched(vm_id)
        assert usage.source is UsageSource.CGROUP
        await do(life, "vm.stop", "a", VmStop(force=True))
        # At once, not when the next sample is due.
        gone = (await life.engine.views.vm("a")).usage
        assert (gone.memory, gone.cpu, gone.cpu_s) == (None, None, None)
        (listed,) = (await life.engine.views.vms()).items
        assert listed.usage.memory is None
        await life.advance(6.0)
        assert (await life.engine.views.vm("a")).usage.memory is None


async def test_rounds_of_every_loop_can_be_interrupted_anywhere() -> None:
    """A daemon that dies in a loop leaves nothing that the next one does not put right."""
    for nth in range(1, 12):
        async with Rig(Policy(trash_s=10.0)) as rig:
            rig.world.add_image()
            async with rig.life() as life:
                await life.advance(1.0)
                await create(life, "a", start=True, autostart=True, disks=(DISK,))
                await create(life, "b", disks=(DISK,))
                await do(life, "vm.delete", "b", VmDelete())
                await do(life, "vm.set", "a", VmSet(description="x"))
            rig.world.reboot()
            async with rig.life() as life:
                rig.world.faults.do("*", _die(life), call=nth * 3)
                await life.advance(100.0)
            async with rig.life() as life:
                rig.world.faults.clear()
                await life.advance(100.0)
                await life.rest()
                assert [v.name for v in (await life.engine.views.vms()).items] == ["a"], nth
                assert (await life.engine.views.vms(trashed=True)).items == ()
            assert await rig.lies() == [], nth


def _die(life: Life) -> Callable[[], None]:
    def die() -> None:
        life.store.crashed = True

    return die
