"""What a snapshot takes is said before, and one that has no room touches nothing."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from mica.engine.definition import Context
from mica.engine.operations.forecasting import BASE_PAUSE_S, USUAL_RATE
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code
from mica.model.operation import OperationState
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import SnapshotSet, VmStart
from mica.model.vm import DiskSpec
from mica.testing.harness import Hooks, Life, Rig, instrument
from mica.testing.simulated import Behaviour
from tests.engine.worlds import create, do, living

DISK = DiskSpec(name="data", size=Bytes(GIB))


async def running(life: Life, changes: int = MIB) -> None:
    life.rig.world.behave("a", Behaviour(touched=0.5, changes=changes))
    await create(life, disks=(DISK,), memory=Bytes(512 * MIB))
    await do(life, "vm.start", "a", VmStart())
    await life.advance(2.0)


async def test_the_first_takes_the_memory_and_later_ones_what_changed() -> None:
    async with living() as life:
        await running(life, changes=500 * MIB)
        first = (await do(life, "snapshot.create", "a", Take(name="one"))).result["expected"]
        assert 256 * MIB <= first["size"] < 270 * MIB
        assert first["pause_s"] == BASE_PAUSE_S
        second = (await do(life, "snapshot.create", "a", Take(name="two"))).result["expected"]
        assert 512 * MIB <= second["size"] < 526 * MIB  # it is folded
        assert second["pause_s"] == pytest.approx(BASE_PAUSE_S + 500 * MIB / USUAL_RATE, abs=0.001)
        without = (await do(life, "snapshot.create", "a", Take(name="three", memory=False))).result["expected"]
        assert without["size"] < 10 * MIB


async def test_a_long_pause_is_said_while_it_is_still_to_come() -> None:
    said: list[str] = []

    async def listen(step: str, context: Context) -> None:
        if step == "forecast":
            for _ in range(20):
                await asyncio.sleep(0)
            said.append((await context.env.records.operations.need(context.operation.id)).value.step)

    async with Rig() as rig:
        rig.world.add_image("micro")
        async with rig.life(definitions=instrument("snapshot.create", Hooks(after_do=listen))) as life:
            await life.advance(0.1)
            await running(life, changes=500 * MIB)
            for name in ("one", "two"):
                await do(life, "snapshot.create", "a", Take(name=name))
    assert said == ["seeing what it will take", "it will stand still for about 1.1 s, for 500 MiB of changed memory"]


async def test_without_room_nothing_is_touched_and_the_way_out_is_named() -> None:
    async with living() as life:
        await running(life)
        for name in ("one", "two", "kept"):
            await do(life, "snapshot.create", "a", Take(name=name))
        kept = next(r.value.id for r in (await life.records.snapshots.scan()).values() if r.value.name == "kept")
        await do(life, "snapshot.set", kept, SnapshotSet(protected=True))
        world = life.rig.world
        before, calls = world.holdings(), world.faults.calls["machine.pause"]
        world.disk_free = 3 * MIB
        ended = await life.run("snapshot.create", "a", Take(name="more"))
        assert ended.state is OperationState.FAILED
        assert ended.problem is not None
        assert (ended.problem.code, ended.problem.retryable) == (Code.INSUFFICIENT_DISK, True)
        assert "takes up to 7 MiB" in ended.problem.message
        assert "a one (" in ended.problem.hint
        assert "a two (" in ended.problem.hint
        assert "kept" not in ended.problem.hint
        assert world.holdings() == before
        assert world.faults.calls["machine.pause"] == calls
        assert len(await life.records.snapshots.scan()) == 3


async def test_how_fast_this_host_writes_is_learnt_from_its_snapshots() -> None:
    async with living() as life:
        await running(life)
        for name in ("one", "two"):
            await do(life, "snapshot.create", "a", Take(name=name))
        two = next(r.value for r in (await life.records.snapshots.scan()).values() if r.value.name == "two")
        assert two.memory is not None
        slow = {"size": Bytes(100 * MIB)}
        await life.records.parts.update(two.memory.changes, lambda part: msgspec.structs.replace(part, **slow))
        await life.records.snapshots.update(two.id, lambda s: msgspec.structs.replace(s, pause_s=2.0))
        expected = (await do(life, "snapshot.create", "a", Take(name="three"))).result["expected"]
        assert expected["pause_s"] == pytest.approx(BASE_PAUSE_S + MIB / (50 * MIB), abs=0.001)
