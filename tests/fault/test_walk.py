"""Random walks: whatever was done to machines, and whoever died meanwhile, each holds what it must."""

from __future__ import annotations

import pytest

from tests.fault.walk import Walk
from tests.integration.world import World

pytestmark = pytest.mark.guest


@pytest.mark.timeout(900)
async def test_every_machine_holds_what_it_must(world: World, walk_seed: int, walk_steps: int) -> None:
    async with world.client() as client:
        walk = Walk(world, client, walk_seed)
        await walk.begin()
        for number in range(walk_steps):
            await walk.step()
            if number == walk_steps // 2:
                await walk.crash()
        await walk.end()
