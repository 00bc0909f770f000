"""Deadlines by the engine's clock, so that tests own them too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mica.ports.clock import Clock


@asynccontextmanager
async def within(clock: Clock, seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """As :func:`asyncio.timeout`, with ``seconds`` of ``clock``: raises :class:`TimeoutError` when they are over.

    The value tells an expired deadline from a :class:`TimeoutError` of somebody else.
    """
    async with asyncio.timeout(None) as deadline:
        alarm = asyncio.get_running_loop().create_task(_ring(clock, seconds, deadline))
        try:
            yield deadline
        finally:
            alarm.cancel()
            await asyncio.wait({alarm})


async def _ring(clock: Clock, seconds: float, deadline: asyncio.Timeout) -> None:
    await clock.sleep(seconds)
    deadline.reschedule(asyncio.get_running_loop().time())
