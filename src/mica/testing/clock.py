"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import Final

# Turns of the event loop that woken tasks get before time goes on: enough for a chain of awaits within the process.
# What needs a thread or another process is waited for by its own condition, never by this clock.
_TURNS: Final = 50


class VirtualClock:
    """:class:`mica.ports.clock.Clock` under the hand of a test. Times are seconds.

    ``now`` begins at ``start`` (Unix time), ``monotonic`` at 0; both move together.
    """

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._start = start
        self._elapsed = 0.0
        self._numbers = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrivals: list[tuple[int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._start + self._elapsed

    def monotonic(self) -> float:
        return self._elapsed

    @property
    def sleeping(self) -> int:
        """How many tasks sleep."""
        return sum(not future.done() for _, _, future in self._sleepers)

    @property
    def next_wake(self) -> float | None:
        """The ``monotonic`` moment at which the first of the sleepers wakes; ``None`` when nobody sleeps."""
        return min((at for at, _, future in self._sleepers if not future.done()), default=None)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, next(self._numbers), future))
        self._announce()
        await future  # one that is cancelled counts no longer, and is dropped when its time comes

    async def advance(self, seconds: float) -> None:
        """Let time pass. Sleepers wake at their own moment, in order; what they start may sleep and wake in turn."""
        if seconds < 0:
            raise ValueError("time does not go back")
        end = self._elapsed + seconds
        await _turns()
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, future = heapq.heappop(self._sleepers)
            if future.done():
                continue
            self._elapsed = max(self._elapsed, at)
            future.set_result(None)
            await _turns()
        self._elapsed = end

    async def until_sleeping(self, tasks: int = 1) -> None:
        """Return as soon as at least that many tasks sleep."""
        if self.sleeping >= tasks:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals.append((tasks, future))
        await future

    def _announce(self) -> None:
        sleeping = self.sleeping
        for tasks, future in list(self._arrivals):
            if sleeping >= tasks:
                self._arrivals.remove((tasks, future))
                if not future.done():
                    future.set_result(None)


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
        if idle():
            return


def idle() -> bool:
    """Whether nobody but the present task could go on now, as far as the event loop can be asked."""
    return not getattr(asyncio.get_running_loop(), "_ready", (True,))
