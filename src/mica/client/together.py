"""Two directions of one conversation: neither outlives the other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def alongside(main: Coroutine[Any, Any, T], *helpers: Coroutine[Any, Any, object]) -> T:
    """Run ``main`` to its end with ``helpers`` beside it, which may end before; then they are cancelled.

    What any of them raises ends all and is raised.
    """
    first = asyncio.ensure_future(main)
    others = {asyncio.ensure_future(helper) for helper in helpers}
    running: set[asyncio.Future[Any]] = {first, *others}
    try:
        while not first.done():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {first}:
                task.result()
        return first.result()
    finally:
        for task in (first, *others):
            task.cancel()
        await asyncio.gather(first, *others, return_exceptions=True)
