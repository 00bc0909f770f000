"""Snapshots that are taken by themselves, and deleted by a rule."""

from __future__ import annotations

import msgspec

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code, MicaError
from mica.model.schedule import ScheduleCreate
from mica.model.snapshot import Snapshot, SnapshotKind
from mica.model.views import SnapshotSet, VmDelete, VmSet, VmStart, VmStop
from mica.testing.harness import Life, Rig
from tests.engine.worlds import create, do, living, refused

replace = msgspec.structs.replace

# Schedules know minutes too, and a simulated host needs as many turns for a second as a real one.
PERIOD = 120.0


async def schedule(life: Life, **body: object) -> str:
    made = await do(life, "schedule.create", "", ScheduleCreate(**{"keep": "60m", **body}))  # type: ignore[arg-type]
    return str(made.result["id"])


async def taken(life: Life, vm: str = "") -> list[Snapshot]:
    return [view.snapshot for view in (await life.engine.views.snapshots(vm)).items]


async def pass_by(life: Life, seconds: float) -> None:
    """Time that a daemon sees go by."""
    while seconds > 0:
        await life.advance(min(seconds, 10.0))
        seconds -= 10.0
    await life.rest()


async def test_a_running_vm_gets_one_at_once_and_then_again_and_again_with_its_memory() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await schedule(life, vm="a", every_s=PERIOD, keep="24m")
        await pass_by(life, 20)
        (first,) = await taken(life, "a")
        assert (first.kind, first.memory is not None) == (SnapshotKind.SCHEDULE, True)
        assert first.name.startswith("auto-")
        (view,) = (await life.engine.views.schedules()).items
        assert (view.target, view.vms, view.snapshots) == ("a", ("a",), 1)
        assert 0 < view.next_at - life.rig.clock.now() <= PERIOD
        await pass_by(life, 2 * PERIOD)
        assert len(await taken(life, "a")) == 3
        assert (await life.engine.views.vm("a")).snapshot == (await taken(life, "a"))[-1].id


async def test_without_memory_where_that_is_not_wanted() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await schedule(life, vm="a", memory=False)
        await pass_by(life, 20)
        assert [s.memory for s in await taken(life)] == [None]


async def test_a_vm_that_has_not_run_since_gets_no_other() -> None:
    async with living() as life:
        await create(life, "a")
        await schedule(life, vm="a", every_s=PERIOD)
        await pass_by(life, 5 * PERIOD)
        assert len(await taken(life)) == 1
        await do(life, "vm.start", "a", VmStart())
        await do(life, "vm.stop", "a", VmStop(force=True))
        await pass_by(life, 5 * PERIOD)
        assert len(await taken(life)) == 2


async def test_of_moments_that_were_missed_one_is_made_up_for() -> None:
    async with Rig() as rig:
        rig.world.add_image("micro")
        async with rig.life() as life:
            await life.advance(0.1)
            await create(life, "a", start=True)
            await schedule(life, vm="a", every_s=PERIOD, keep="48m")
            await pass_by(life, 20)
        await rig.clock.advance(10 * PERIOD)
        for _ in range(3):  # also when daemons come and go
            async with rig.life() as life:
                await pass_by(life, 20)
                assert len(await taken(life)) == 2
        assert await rig.lies() == []


async def test_those_with_a_label_are_covered_now_and_later() -> None:
    async with living() as life:
        await create(life, "a", labels={"tier": "web"}, start=True)
        await create(life, "b", start=True)
        await schedule(life, label="tier=web", every_s=PERIOD, keep="9m")
        await pass_by(life, 20)
        assert {s.vm_name for s in await taken(life)} == {"a"}
        await do(life, "vm.set", "b", VmSet(labels={"tier": "web"}))
        await do(life, "vm.set", "a", VmSet(labels={"tier": None}))
        await pass_by(life, 2 * PERIOD)
        names = [s.vm_name for s in await taken(life)]
        assert (names.count("a"), names.count("b")) == (1, 3)


async def test_what_no_rule_keeps_goes_and_what_is_protected_stays() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await do(life, "snapshot.create", "a", Take(name="mine", memory=False))
        await schedule(life, vm="a", every_s=PERIOD, keep="3m", memory=False)
        await pass_by(life, 20)
        first = (await taken(life))[1]
        await do(life, "snapshot.set", first.id, SnapshotSet(protected=True))
        await pass_by(life, 8 * PERIOD)
        names = [s.name for s in await taken(life)]
        assert names[:2] == ["mine", first.name]
        assert len(names) == 2 + 3


async def test_a_damaged_one_takes_no_good_ones_place() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await schedule(life, vm="a", every_s=PERIOD, keep="2m")
        await pass_by(life, PERIOD + 20)
        first, second = await taken(life)
        assert second.memory is not None
        await life.records.parts.update(second.memory.devices, lambda part: replace(part, damaged="a bit"))
        await pass_by(life, PERIOD)
        assert [s.id for s in await taken(life)][:2] == [first.id, second.id]
        assert len(await taken(life)) == 3, "there are to be two good ones"
        await pass_by(life, PERIOD)
        left = {s.id for s in await taken(life)}
        assert len(left) == 2
        assert not {first.id, second.id} & left


async def test_a_moment_at_which_it_fails_is_not_tried_again_and_the_next_one_is() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        life.rig.world.faults.fail("machine.capture", MicaError(Code.INSUFFICIENT_DISK, "no room"))
        await schedule(life, vm="a", every_s=PERIOD)
        await pass_by(life, PERIOD / 2)
        assert await taken(life) == []
        failed = [o for o in (await life.engine.views.operations()).items if o.verb == "snapshot.create"]
        assert len(failed) == 1
        await pass_by(life, PERIOD)
        assert len(await taken(life)) == 1


async def test_a_suspended_vm_is_left_alone_and_a_deleted_one_ends_its_schedule() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await do(life, "vm.suspend", "a", NoParams())
        id_ = await schedule(life, vm="a", every_s=PERIOD)
        await pass_by(life, 2 * PERIOD)
        assert await taken(life) == []
        await do(life, "vm.purge", "a", VmDelete(purge=True, force=True))
        await pass_by(life, 20)
        assert await life.records.schedules.scan() == {}
        await refused(life, Code.NOT_FOUND, "schedule.delete", id_, NoParams())


async def test_after_a_schedule_is_deleted_its_snapshots_stay() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        id_ = await schedule(life, vm="a", every_s=PERIOD, keep="1m")
        await pass_by(life, 20)
        await do(life, "schedule.delete", id_, NoParams())
        await pass_by(life, 3 * PERIOD)
        assert len(await taken(life)) == 1


async def test_what_cannot_be_scheduled_is_refused() -> None:
    async with living() as life:
        await create(life, "a")
        for body in (
            ScheduleCreate(),
            ScheduleCreate(vm="a", label="x"),
            ScheduleCreate(vm="a", every_s=1.0),
            ScheduleCreate(vm="a", keep="all"),
            ScheduleCreate(label="not a label"),
        ):
            await refused(life, Code.INVALID, "schedule.create", "", body)
        await refused(life, Code.NOT_FOUND, "schedule.create", "", ScheduleCreate(vm="nobody"))
