"""Requests: names, keys that repeat, generations, queues, cancelling, and what is refused."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from mica.engine.definition import NoParams, Policy
from mica.model.errors import Code, MicaError
from mica.model.image import MicroRecipe
from mica.model.operation import Actor, OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import ImageMake, VmCreate, VmDelete, VmRestore, VmSet, VmStart, VmStop
from mica.model.vm import DiskSpec, NicSpec, Publish, VmState
from mica.testing.harness import BY, Rig
from mica.testing.simulated import Behaviour
from tests.engine.worlds import create, do, living, refused

NOBODY = Behaviour(agent_after_s=None, obeys_after_s=None)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["A", "-a", "a-", "a_b", "a.b", "a" * 64, "ä", "a\n", " a"])
async def test_a_name_is_a_dns_label(name: str) -> None:
    async with living() as life:
        error = await refused(life, Code.INVALID, "vm.create", "", VmCreate(name=name, image="micro"))
        assert repr(name) in error.message
        await create(life, "good")
        await refused(life, Code.INVALID, "vm.set", "good", VmSet(name=name))


async def test_a_name_belongs_to_one_vm() -> None:
    async with living() as life:
        first = await create(life, "a")
        error = await refused(life, Code.EXISTS, "vm.create", "", VmCreate(name="a", image="micro"))
        assert first.id[:8] in error.message
        await create(life, "b")
        await refused(life, Code.EXISTS, "vm.set", "b", VmSet(name="a"))
        await do(life, "vm.set", "a", VmSet(name="c"))
        await do(life, "vm.set", "b", VmSet(name="a"))
        assert (await life.engine.views.vm("c")).id == first.id


async def test_two_creations_race_for_a_name_and_one_wins() -> None:
    async with living() as life:
        life.rig.world.faults.slow("hypervisor.check", 1.0)
        tasks = [asyncio.create_task(life.submit("vm.create", "", VmCreate(name="a", image="micro"))) for _ in range(3)]
        await life.advance(10.0)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        codes = [d.code for d in done if isinstance(d, MicaError)]
        assert codes == [Code.EXISTS] * 2
        life.rig.world.faults.clear()


async def test_names_are_made_from_the_image_and_fit_a_dns_label() -> None:
    async with living() as life:
        long = "x" * 61 + "-y"
        life.rig.world.add_image(long)
        await life.engine.loops[1].once()
        made = [(await do(life, "vm.create", "", VmCreate(image=i))).result["name"] for i in ("micro", "micro", long)]
        assert made == ["micro-1", "micro-2", "x" * 56 + "-1"]


async def test_a_vm_is_found_by_name_id_and_the_beginning_of_its_id() -> None:
    async with living() as life:
        vm = await create(life, "a")
        for ref in ("a", vm.id, vm.id[:8]):
            assert (await life.engine.views.vm(ref)).id == vm.id
        for ref in ("b", vm.id[:7], ""):
            with pytest.raises(MicaError) as caught:
                await life.engine.views.vm(ref)
            assert caught.value.code is Code.NOT_FOUND


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (VmCreate(image="micro", cpus=0), "0 vCPUs"),
        (VmCreate(image="micro", cpus=65), "65 vCPUs"),
        (VmCreate(image="micro", memory=Bytes(32 * MIB)), "64 MiB that image micro needs"),
        (VmCreate(memory=Bytes(MIB)), "below 32 MiB"),
        (VmCreate(image="big", disk=Bytes(GIB)), "below the 4 GiB of image big"),
        (VmCreate(image="micro", disks=(DiskSpec(name="d", size=Bytes(513)),)), "below 1 MiB"),
        (VmCreate(image="micro", boot=("nothing",)), "'nothing', which is no disk or NIC"),
        (VmCreate(image="micro", hostname="A b"), "hostname 'A b'"),
        (VmCreate(image="micro", labels={"": "x"}), "label key ''"),
        (VmCreate(image="micro", nics=(NicSpec(),), publish=(Publish(22, 2222),)), "not both"),
    ],
)
async def test_a_creation_that_cannot_be_is_refused_naming_the_limit(body: VmCreate, word: str) -> None:
    async with living() as life:
        life.rig.world.add_image("big", disk_size=4 * GIB)
        await life.engine.loops[1].once()
        error = await refused(life, Code.INVALID, "vm.create", "", body)
        assert word in error.message, error


async def test_an_image_that_is_not_there_is_refused_naming_those_that_are() -> None:
    async with living() as life:
        error = await refused(life, Code.NOT_FOUND, "vm.create", "", VmCreate(image="debain"))
        assert "debain" in error.message
        assert "there are: micro" in error.hint


async def test_a_damaged_image_makes_no_vm_until_it_is_built_again() -> None:
    async with living() as life:
        digest = next(iter(life.rig.world.images))
        life.rig.world.damaged.add(digest)
        verified = await life.run("image.verify", "micro", NoParams())
        assert verified.state is OperationState.FAILED
        assert (await life.engine.views.image("micro")).damaged == "file kernel of image micro is damaged"
        error = await refused(life, Code.CORRUPT, "vm.create", "", VmCreate(image="micro"))
        assert "mica image delete micro" in error.hint
        life.rig.world.damaged.clear()
        await do(life, "image.verify", "micro", NoParams())
        await create(life, "a")


async def test_a_disk_can_grow_and_not_shrink_or_vanish() -> None:
    async with living() as life:
        disk = DiskSpec(name="d", size=Bytes(GIB))
        await create(life, "a", disks=(disk,))
        error = await refused(
            life, Code.INVALID, "vm.set", "a", VmSet(disks=(msgspec.structs.replace(disk, size=Bytes(MIB)),))
        )
        assert "cannot shrink" in error.message
        await refused(life, Code.INVALID, "vm.set", "a", VmSet(disks=()))
        await do(life, "vm.set", "a", VmSet(disks=(msgspec.structs.replace(disk, size=Bytes(2 * GIB)),)))
        await do(life, "vm.start", "a", VmStart())
        assert life.rig.world.process("a").plan.volumes[0].size == 2 * GIB


async def test_protection_stands_against_deletion() -> None:
    async with living() as life:
        await create(life, "a", protected=True)
        for verb, body in (("vm.delete", VmDelete()), ("vm.purge", VmDelete(purge=True, force=True))):
            assert "--no-protected" in (await refused(life, Code.PROTECTED, verb, "a", body)).hint
        await do(life, "vm.set", "a", VmSet(protected=False))
        await do(life, "vm.delete", "a", VmDelete())


async def test_an_unknown_verb_is_not_found() -> None:
    async with living() as life:
        await refused(life, Code.NOT_FOUND, "vm.explode", "a", NoParams())


# ── keys and generations ──────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_key_is_the_same_operation() -> None:
    async with living() as life:
        body = VmCreate(name="a", image="micro")
        first = await life.submit("vm.create", "", body, idempotency_key="k")
        assert (await life.submit("vm.create", "", body, idempotency_key="k")).id == first.id
        await life.rest()
        again = await life.submit("vm.create", "", body, idempotency_key="k")
        assert (again.id, again.state) == (first.id, OperationState.SUCCEEDED)
        error = await refused(
            life, Code.INVALID, "vm.create", "", VmCreate(name="b", image="micro"), idempotency_key="k"
        )
        assert "another request" in error.message
        # Somebody else's key is another key.
        other = await life.submit(
            "vm.create", "", VmCreate(name="b", image="micro"), idempotency_key="k", by=Actor("eve")
        )
        assert other.id != first.id


async def test_two_requests_with_one_key_at_once_are_one_operation() -> None:
    async with living() as life:
        life.rig.world.faults.slow("hypervisor.check", 1.0)
        body = VmCreate(name="a", image="micro")
        tasks = [asyncio.create_task(life.submit("vm.create", "", body, idempotency_key="k")) for _ in range(3)]
        await life.advance(10.0)
        assert len({o.id for o in await asyncio.gather(*tasks)}) == 1
        life.rig.world.faults.clear()


async def test_a_key_survives_the_daemon_and_not_its_operation() -> None:
    async with Rig(Policy(operation_retention_s=3600.0)) as rig:
        rig.world.add_image()
        body = VmCreate(name="a", image="micro")
        async with rig.life() as life:
            await life.advance(1.0)
            first = await life.submit("vm.create", "", body, idempotency_key="k")
        async with rig.life() as life:
            assert (await life.submit("vm.create", "", body, idempotency_key="k")).id == first.id
            await life.rest()
            await life.advance(3600.0 + 700.0)
            error = await refused(life, Code.GONE, "vm.create", "", body, idempotency_key="k")
            assert "no longer kept" in error.message


async def test_if_match_takes_the_generation_that_was_seen() -> None:
    async with living() as life:
        seen = (await create(life, "a")).generation
        await do(life, "vm.set", "a", VmSet(description="new"), if_match=seen)
        error = await refused(life, Code.GENERATION_CONFLICT, "vm.set", "a", VmSet(description="x"), if_match=seen)
        assert error.details["if_match"] == seen
        now = (await life.engine.views.vm("a")).generation
        await refused(life, Code.GENERATION_CONFLICT, "vm.delete", "a", VmDelete(), if_match=now + 1)
        await do(life, "vm.delete", "a", VmDelete(), if_match=now)


async def test_a_request_for_what_is_so_already_succeeds_at_once() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        operation = await life.submit("vm.start", "a", VmStart())
        assert (operation.state, operation.result) == (OperationState.SUCCEEDED, {"already": True})
        assert operation.ended_at is not None


# ── queues ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_requests_run_in_the_order_in_which_they_were_accepted() -> None:
    async with living() as life:
        await create(life, "a")
        verbs = [("vm.start", VmStart()), ("vm.pause", NoParams()), ("vm.resume", NoParams()), ("vm.stop", VmStop())]
        operations = [await life.submit(verb, "a", body) for verb, body in verbs]
        await life.rest()
        ended = [(await life.engine.views.operation(o.id)) for o in operations]
        assert [o.state for o in ended] == [OperationState.SUCCEEDED] * 4
        for before, after in itertools.pairwise(ended):
            assert before.ended_at is not None
            assert after.started_at is not None
            assert before.ended_at <= after.started_at


async def test_queued_requests_keep_their_order_over_a_crash() -> None:
    async with Rig() as rig:
        rig.world.add_image()
        rig.world.behave("a", Behaviour(obeys_after_s=30.0))
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True)
            await life.advance(2.0)
            accepted = [
                (await life.submit("vm.stop", "a", VmStop())).id,
                (await life.submit("vm.set", "a", VmSet(description="1"))).id,
                (await life.submit("vm.start", "a", VmStart(paused=True))).id,
                (await life.submit("vm.set", "a", VmSet(description="2"))).id,
                (await life.submit("vm.resume", "a", NoParams())).id,
            ]
        async with rig.life() as life:
            assert [o.id for o in life.engine.waiting((await life.engine.views.vm("a")).id)] == accepted
            await life.rest()
            ended = [await life.engine.views.operation(i) for i in accepted]
            assert [o.state for o in ended] == [OperationState.SUCCEEDED] * 5
            assert ended == sorted(ended, key=lambda o: o.ended_at or 0.0)
        assert await rig.lies() == []


async def test_a_full_inbox_says_so() -> None:
    async with living(Policy(inbox_capacity=3)) as life:
        life.rig.world.behave("a", NOBODY)
        await create(life, "a", start=True)
        stop = await life.submit("vm.stop", "a", VmStop())
        for n in range(2):
            await life.submit("vm.set", "a", VmSet(description=str(n)))
        error = await refused(life, Code.BUSY, "vm.set", "a", VmSet(description="3"))
        assert error.retryable
        assert "3 operations waiting" in error.message
        assert (await life.finish(stop.id)).result["how"] == "forced"


async def test_builds_do_not_queue_without_bound() -> None:
    async with living(Policy(inbox_capacity=3)) as life:
        life.rig.world.build_s = 100.0
        for n in range(3):
            await life.submit("image.make", "", ImageMake(MicroRecipe(name=f"i{n}")))
        with pytest.raises(MicaError) as caught:
            await life.submit("image.make", "", ImageMake(MicroRecipe(name="i3")))
        assert (caught.value.code, caught.value.retryable) == (Code.BUSY, True)


async def test_nothing_begins_on_a_vm_of_which_an_operation_is_stuck() -> None:
    """Taking it back later would hit what was done since."""
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            await create(life, "a", start=True)
            rig.world.faults.fail("slices.remove", call=0)
            stop = await life.submit("vm.stop", "a", VmStop(force=True))
            queued = await life.submit("vm.start", "a", VmStart())
            await life.rest()
            assert (await life.engine.views.operation(stop.id)).state is OperationState.STUCK
            ended = await life.engine.views.operation(queued.id)
            assert ended.problem is not None
            assert ended.problem.code is Code.STUCK
        async with rig.life() as life:
            await life.rest()
            rig.world.faults.clear()
            error = await refused(life, Code.STUCK, "vm.start", "a", VmStart())
            assert f"mica operation resolve {stop.id[:8]} retry" in error.hint
            await life.engine.resolve(stop.id, "retry", by=BY)
            assert (await life.finish(stop.id)).state is OperationState.FAILED
            await do(life, "vm.start", "a", VmStart())
        assert await rig.lies() == []


async def test_what_waits_for_a_creation_that_fails_fails_too() -> None:
    async with living() as life:
        life.rig.world.faults.fail("volumes.create")
        made = await life.submit(
            "vm.create", "", VmCreate(name="a", image="micro", disks=(DiskSpec(name="d", size=Bytes(GIB)),))
        )
        queued = [
            await life.submit("vm.set", "a", VmSet(name="b")),
            await life.submit("vm.start", "b", VmStart()),
            await life.submit("vm.delete", "b", VmDelete(force=True)),
        ]
        assert (await life.finish(made.id)).state is OperationState.FAILED
        for operation in queued:
            ended = await life.finish(operation.id)
            assert ended.state is OperationState.FAILED
            assert ended.problem is not None
            assert ended.problem.code is Code.NOT_FOUND
        assert life.rig.world.volumes == {}
        await create(life, "a")
        await create(life, "b")


async def test_cancelling_a_request_that_waits_takes_back_what_it_had_claimed() -> None:
    async with living() as life:
        life.rig.world.behave("a", NOBODY)
        await create(life, "a", start=True)
        stop = await life.submit("vm.stop", "a", VmStop(timeout_s=30.0))
        before = (await life.engine.views.vm("a")).spec
        waiting = [
            await life.submit("vm.set", "a", VmSet(name="b", memory=Bytes(GIB), labels={"x": "y"})),
            await life.submit("vm.start", "b", VmStart()),
        ]
        for operation in reversed(waiting):
            await life.engine.cancel(operation.id, by=BY)
        await life.rest()
        assert (await life.engine.views.operation(stop.id)).state is OperationState.SUCCEEDED
        for operation in waiting:
            assert (await life.engine.views.operation(operation.id)).state is OperationState.CANCELLED
        vm = await life.engine.views.vm("a")
        assert (vm.spec, vm.labels, vm.observed.state) == (before, {}, VmState.STOPPED)
        await create(life, "b")


async def test_a_set_that_fails_takes_back_its_own_changes_only() -> None:
    async with living() as life:
        await create(life, "a", start=True, labels={"keep": "1", "old": "1"})
        life.rig.world.faults.hang("machine.apply")
        failing = await life.submit(
            "vm.set", "a", VmSet(cpus=2, memory=Bytes(GIB), labels={"old": None, "new": "1"}, description="first")
        )
        await life.quiet()
        later = await life.submit("vm.set", "a", VmSet(memory=Bytes(2 * GIB), labels={"later": "1"}))
        assert (await life.finish(failing.id)).state is OperationState.FAILED
        assert (await life.finish(later.id)).state is OperationState.SUCCEEDED
        vm = await life.engine.views.vm("a")
        assert (vm.spec.cpus, vm.spec.memory, vm.description) == (1, 2 * GIB, "")
        assert vm.labels == {"keep": "1", "old": "1", "later": "1"}


async def test_cancelling_what_has_ended_is_refused() -> None:
    async with living() as life:
        await create(life, "a")
        operation = (await life.engine.views.operations()).items[0]
        with pytest.raises(MicaError) as caught:
            await life.engine.cancel(operation.id, by=BY)
        assert caught.value.code is Code.STATE_CONFLICT


async def test_resolving_needs_a_stuck_operation_and_a_word_for_it() -> None:
    async with living() as life:
        await create(life, "a")
        operation = (await life.engine.views.operations()).items[0]
        for how, code in (("retry", Code.STATE_CONFLICT), ("ignore", Code.INVALID)):
            with pytest.raises(MicaError) as caught:
                await life.engine.resolve(operation.id, how, by=BY)
            assert caught.value.code is code


async def test_a_restore_waits_behind_nothing_and_takes_a_new_name_when_the_old_is_taken() -> None:
    async with living() as life:
        first = await create(life, "a")
        await do(life, "vm.delete", "a", VmDelete())
        await create(life, "a")
        for meant in (first.id, "a"):  # a VM that lives has that name, and is not what can be restored
            error = await refused(life, Code.EXISTS, "vm.restore", meant, VmRestore())
            assert "a" in error.message
            assert "mica vm restore a --name" in error.hint
        await do(life, "vm.restore", "a", VmRestore(name="c"))
        back = await life.engine.views.vm("c")
        assert (back.id, back.deleted_at, back.expires_at, back.observed.state) == (
            first.id,
            None,
            None,
            VmState.STOPPED,
        )
