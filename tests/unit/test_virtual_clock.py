"""The clock that tests own."""

from __future__ import annotations

import asyncio

import pytest

from mica.testing.clock import VirtualClock


async def test_time_stands_still_until_it_is_moved() -> None:
    clock = VirtualClock(start=100.0)
    assert [clock.now(), clock.monotonic()] == [100.0, 0.0]
    await clock.advance(2.5)
    assert [clock.now(), clock.monotonic()] == [102.5, 2.5]
    with pytest.raises(ValueError, match="back"):
        await clock.advance(-1)


async def test_sleepers_wake_in_order_at_their_own_moment() -> None:
    clock = VirtualClock()
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            seen.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("late", 3))
        group.create_task(sleeper("early", 1))
        group.create_task(sleeper("twice", 1, 1))
        group.create_task(sleeper("not yet", 10))
        await clock.until_sleeping(4)
        assert [clock.next_wake, clock.sleeping] == [1, 4]
        await clock.advance(5)
        assert seen == [("early", 1), ("twice", 1), ("twice", 2), ("late", 3)]
        assert [clock.sleeping, clock.next_wake] == [1, 10]
        await clock.advance(5)
    assert seen[-1] == ("not yet", 10.0)
    assert not clock.sleeping


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(clock.sleep(1))
    await clock.until_sleeping()
    task.cancel()
    await asyncio.wait([task])
    assert clock.sleeping == 0
    await clock.advance(2)
    assert clock.monotonic() == 2


async def test_no_time_at_all_still_lets_others_run() -> None:
    clock = VirtualClock()
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    task = asyncio.create_task(run())
    await clock.sleep(0)
    assert ran == [1]
    await task
