"""Faults: what goes wrong in a simulated host, and when.

Every call of a fake's method is counted under its name (``volumes.create``, ``machine.pause`` …). A fault waits for
one of these calls and then fails it, holds it up, or does something else to the world.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from mica.model.errors import Code, MicaError
from mica.ports.clock import Clock

_EVERY: Final = 0


@dataclass
class _Armed:
    method: str
    call: int
    after: bool
    act: Callable[[], BaseException | None]
    delay_s: float = 0.0
    hang: bool = False
    seen: int = 0

    def due(self) -> bool:
        return self.call in (_EVERY, self.seen)


class Faults:
    """Calls are counted from the moment a fault is armed: ``call`` 1 is the next one, 0 is each.

    ``method`` is ``fake.method``, or ``*`` for any. ``after``: the call has had its effect before it fails; only for
    methods whose contract does not say that a failed call leaves nothing.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._armed: list[_Armed] = []
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.struck = 0

    def fail(self, method: str, error: BaseException | None = None, *, call: int = 1, after: bool = False) -> None:
        """Raise ``error`` (by default a ``command-failed``)."""
        raised = error or MicaError(Code.COMMAND_FAILED, f"{method} failed, as the test wanted")
        self._armed.append(_Armed(method, call, after, lambda: raised))

    def do(self, method: str, action: Callable[[], None], *, call: int = 1, after: bool = False) -> None:
        """Do something to the world when the call comes: kill a machine, close a port."""

        def act() -> None:
            action()

        self._armed.append(_Armed(method, call, after, act))

    def hang(self, method: str, *, call: int = 1, after: bool = False) -> None:
        """Never answer; whoever waits gives up by a deadline of his own."""
        self._armed.append(_Armed(method, call, after, lambda: None, hang=True))

    def slow(self, method: str, seconds: float, *, call: int = _EVERY) -> None:
        """Answer after that many seconds of the clock."""
        self._armed.append(_Armed(method, call, False, lambda: None, delay_s=seconds))

    def clear(self) -> None:
        """Disarm everything and forget the log; the counters stay."""
        self._armed.clear()
        self.log.clear()
        self.struck = 0

    def strike(self, method: str) -> None:
        """For methods that cannot be awaited: count the call and raise what is due."""
        self.calls[method] += 1
        self.log.append(method)
        for fault in self._due(method, after=False):
            self._act(fault)

    @asynccontextmanager
    async def around(self, method: str) -> AsyncIterator[None]:
        """Wraps the effect of one call."""
        self.calls[method] += 1
        self.log.append(method)
        await self._strike(self._due(method, after=False))
        late = self._due(method, after=True)
        yield
        await self._strike(late)

    def _due(self, method: str, *, after: bool) -> list[_Armed]:
        due = []
        for fault in self._armed:
            if fault.after is after and fault.method in (method, "*"):
                fault.seen += 1
                if fault.due():
                    due.append(fault)
        return due

    async def _strike(self, due: list[_Armed]) -> None:
        for fault in due:
            if fault.hang:
                self.struck += 1
                await asyncio.get_running_loop().create_future()
            if fault.delay_s:
                await self._clock.sleep(fault.delay_s)
            self._act(fault)

    def _act(self, fault: _Armed) -> None:
        self.struck += 1
        if fault.call != _EVERY:
            self._armed.remove(fault)
        error = fault.act()
        if error is not None:
            raise error
