"""Time, so that tests may own it."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """``now`` is Unix time in seconds; ``monotonic`` never goes back and starts anywhere."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...
