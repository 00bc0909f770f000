"""Waiting for something to become true, on events, until a deadline or until the server closes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

from mica.api.facade import Facade
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation, OperationState

T = TypeVar("T")


class CutShort(Exception):  # noqa: N818 - an answer, not a fault
    """What was waited for had not ended when something else did."""


async def first(main: Coroutine[Any, Any, T], *ends: Coroutine[Any, Any, object], timeout_s: float | None = None) -> T:
    """Run ``main`` until it ends, or until one of ``ends`` does or the time is over: then it is cancelled.

    Returns what ``main`` returns, raises what any of them raises, and :class:`CutShort` when ``main`` was cut short.
    Nothing is left running.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (main, *ends)]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            return cast("T", tasks[0].result())
        for task in done:
            task.result()
        raise CutShort
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all until all have ended; the first that raises ends the others, and that is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as error:
        raise error.exceptions[0] from None


def _settled(operation: Operation) -> bool:
    return operation.state.ended or operation.state is OperationState.STUCK


async def _ended(engine: Facade, operation_id: str, since: int) -> None:
    events = cast("Any", engine.events(since))
    async with aclosing(events):
        async for event in events:
            if event.kind == "operation" and event.id == operation_id and _settled(await engine.operation(event.id)):
                return


async def operation_ended(engine: Facade, operation_id: str, wait_s: float, closing: asyncio.Event) -> Operation:
    """The operation as it is when it has ended, is stuck, the time is over, or the server closes."""
    since = await engine.revision()
    operation = await engine.operation(operation_id)
    if _settled(operation) or wait_s <= 0:
        return operation
    try:
        await first(_ended(engine, operation.id, since), closing.wait(), timeout_s=wait_s)
    except CutShort:
        pass
    except MicaError as error:
        if error.code is not Code.GONE:  # so much happened meanwhile that events are gone: look again
            raise
    return await engine.operation(operation_id)
