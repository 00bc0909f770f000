"""What readers see: pages, views, and the stream of events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from mica.engine.definition import NoParams
from mica.model.errors import Code, MicaError
from mica.model.image import DebianRecipe
from mica.model.operation import Operation, OperationState
from mica.model.units import MIB
from mica.model.views import Event, ImageMake, VmCreate, VmDelete, VmSet, VmStop, VmView
from mica.model.vm import VmState
from mica.testing.harness import Life, Rig
from tests.engine.worlds import create, do, living


async def take(life: Life, since: int | None, until: int) -> list[Event]:
    """Events after ``since`` up to a revision."""
    got: list[Event] = []
    async with aclosing(life.engine.views.events(since)) as stream:
        async for event in stream:
            got.append(event)
            if event.revision >= until:
                return got
    return got


async def test_pages_follow_one_another_without_loss() -> None:
    async with living() as life:
        for n in range(7):
            await create(life, f"v{n}", labels={"odd": str(n % 2)})
        seen: list[str] = []
        after = ""
        while True:
            page = await life.engine.views.vms(after=after, limit=3)
            seen += [v.name for v in page.items]
            if not page.next:
                break
            after = page.next
        assert sorted(seen) == [f"v{n}" for n in range(7)]
        odd = await life.engine.views.vms(labels={"odd": "1"}, limit=3)
        assert (len(odd.items), odd.next) == (3, "")
        for limit in (0, 1001):
            with pytest.raises(MicaError) as caught:
                await life.engine.views.vms(limit=limit)
            assert caught.value.code is Code.INVALID


async def test_operations_are_listed_newest_first_by_vm_and_by_being_active() -> None:
    async with living() as life:
        await create(life, "a")
        await life.advance(1.0)
        await create(life, "b", start=True)
        stop = await life.submit("vm.stop", "b", VmStop())
        active = (await life.engine.views.operations(active=True)).items
        assert [o.id for o in active] == [stop.id]
        await life.rest()
        await life.advance(1.0)
        everything = (await life.engine.views.operations()).items
        assert [o.created_at for o in everything] == sorted((o.created_at for o in everything), reverse=True)
        assert {o.verb for o in (await life.engine.views.operations(vm="b")).items} == {"vm.create", "vm.stop"}
        first = await life.engine.views.operations(limit=2)
        rest = await life.engine.views.operations(limit=2, after=first.next)
        assert [o.id for o in (*first.items, *rest.items)] == [o.id for o in everything]
        assert (await life.engine.views.operation(stop.id[:8])).id == stop.id
        with pytest.raises(MicaError) as caught:
            await life.engine.views.operation("00000000")
        assert caught.value.code is Code.NOT_FOUND


async def test_a_view_shows_what_is_under_way() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        stop = await life.submit("vm.stop", "a", VmStop())
        assert (await life.engine.views.vm("a")).operations == (stop.id,)
        await life.rest()
        view = await life.engine.views.vm("a")
        assert (view.operations, view.process, view.nics, view.accelerator) == ((), None, (), "")


async def test_waiting_for_an_operation_returns_at_its_end_and_not_before() -> None:
    async with living() as life:
        operation = await life.submit("vm.create", "", VmCreate(name="a", image="micro"))
        waiter = asyncio.create_task(life.engine.views.wait_operation(operation.id, 30.0))
        await life.rest()
        assert (await waiter).state is OperationState.SUCCEEDED
        life.rig.world.build_s = 1000.0
        again = await life.submit("vm.create", "", VmCreate(name="b", image="micro"))
        assert (await life.engine.views.wait_operation(again.id, 0.0)).id == again.id


async def test_progress_is_seen_while_it_is_made() -> None:
    async with living() as life:
        life.rig.world.build_s = 40.0
        operation = await life.submit("image.make", "", ImageMake(DebianRecipe()))
        seen = []
        for _ in range(4):
            await life.advance(10.0)
            shown = await life.engine.views.operation(operation.id)
            seen.append((shown.progress, shown.step))
        assert seen[:3] == [(n / 4, "building debian") for n in (1, 2, 3)]
        assert seen[3] == (1.0, "")


async def test_images_name_their_users_in_the_trash_too() -> None:
    async with living() as life:
        await create(life, "a")
        await create(life, "b")
        await do(life, "vm.delete", "b", VmDelete())
        assert (await life.engine.views.image("micro")).used_by == ("a", "b")
        assert (await life.engine.views.images()).items[0].image.size == 16 * MIB


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_events_since_a_revision_tell_everything_that_changed_as_it_is_now() -> None:
    async with living() as life:
        since = await life.rig.store.revision()
        vm = await create(life, "a", start=True)
        await life.advance(5.0)
        now = await life.rig.store.revision()
        events = await take(life, since, now)
        told = {(e.kind, e.id): e.object for e in events}
        assert isinstance(told["vm", vm.id], VmView)
        assert told["vm", vm.id].observed.state is VmState.RUNNING
        operations = [o for (kind, _), o in told.items() if kind == "operation"]
        assert all(isinstance(o, Operation) and o.state is OperationState.SUCCEEDED for o in operations)


async def test_a_reader_that_goes_on_from_any_event_misses_nothing() -> None:
    async with living() as life:
        since = await life.rig.store.revision()
        await create(life, "a", start=True)
        await create(life, "b")
        await do(life, "vm.delete", "b", VmDelete())
        now = await life.rig.store.revision()
        whole = await take(life, since, now)
        final = {(e.kind, e.id): e.object for e in whole}
        for cut in range(len(whole)):
            seen = {(e.kind, e.id): e.object for e in whole[: cut + 1]}
            resume = whole[cut].revision
            if resume < now:
                seen.update({(e.kind, e.id): e.object for e in await take(life, resume, now)})
            assert seen == final, cut


async def test_a_vm_that_is_gone_is_told_as_gone() -> None:
    async with living() as life:
        vm = await create(life, "a")
        since = await life.rig.store.revision()
        await do(life, "vm.purge", "a", VmDelete(purge=True))
        events = await take(life, since, await life.rig.store.revision())
        assert [e.object for e in events if e.kind == "vm" and e.id == vm.id][-1] is None


async def test_events_come_when_something_happens() -> None:
    async with living() as life:
        await create(life, "a", start=True)
        await life.advance(10.0)
        stream = life.engine.views.events(None)
        async with aclosing(stream):
            next_ = asyncio.ensure_future(anext(stream))
            await life.quiet()
            assert not next_.done()
            life.rig.world.process("a").kill()
            await life.rest()
            event = await next_
            assert event.kind == "vm"
            assert isinstance(event.object, VmView)
            assert event.object.observed.state is VmState.CRASHED


async def test_changes_that_are_no_longer_kept_are_gone_and_so_are_those_that_never_were() -> None:
    async with living() as life:
        await create(life, "a")
        revision = await life.rig.store.revision()
        await life.rig.store.compact(2)
        for since in (0, revision - 3, revision + 1):
            with pytest.raises(MicaError) as caught:
                await anext(aiter(life.engine.views.events(since)))
            assert caught.value.code is Code.GONE
            assert "list everything again" in caught.value.hint
        await do(life, "vm.set", "a", VmSet(description="x"))
        assert await take(life, revision, revision + 1)


async def test_the_revision_of_a_list_is_where_its_events_begin() -> None:
    async with living() as life:
        await create(life, "a")
        page = await life.engine.views.vms()
        await do(life, "vm.set", "a", VmSet(description="x"))
        events = await take(life, page.revision, await life.rig.store.revision())
        assert any(isinstance(e.object, VmView) and e.object.description == "x" for e in events)


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_image_in_use_is_not_deleted_and_says_by_whom() -> None:
    async with living() as life:
        await create(life, "a")
        with pytest.raises(MicaError) as caught:
            await life.submit("image.delete", "micro", NoParams())
        assert caught.value.code is Code.IN_USE
        assert caught.value.details == {"used_by": ["a"]}
        await do(life, "vm.delete", "a", VmDelete())
        with pytest.raises(MicaError):
            await life.submit("image.delete", "micro", NoParams())
        await do(life, "vm.purge", (await life.engine.views.vms(trashed=True)).items[0].id, VmDelete(purge=True))
        await do(life, "image.delete", "micro", NoParams())
        assert life.rig.world.images == {}


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_deleting_an_image_and_making_a_vm_from_it_never_both_succeed(turns: int) -> None:
    async with Rig() as rig:
        rig.world.add_image()
        async with rig.life() as life:
            await life.advance(1.0)
            delete = await life.submit("image.delete", "micro", NoParams())
            for _ in range(turns):
                await asyncio.sleep(0)
            created = await _creates(life)
            deleted = await life.finish(delete.id)
            assert created is not (deleted.state is OperationState.SUCCEEDED)
            if created:
                assert deleted.problem is not None
                assert deleted.problem.code is Code.IN_USE
                assert len(rig.world.images) == 1
        assert await rig.lies() == []


async def _creates(life: Life) -> bool:
    try:
        made = await life.submit("vm.create", "", VmCreate(name="a", image="micro"))
    except MicaError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        return False
    return (await life.finish(made.id)).state is OperationState.SUCCEEDED
