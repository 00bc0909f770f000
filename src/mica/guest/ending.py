"""Ending a command before it ends by itself: signals, a stop in two steps, and what remains after it."""

from __future__ import annotations

import signal as signals
import time
from enum import Enum, auto

from mica.guest import outcome
from mica.guest.log import CommandEvents
from mica.guest.patience import Patience
from mica.guest.runner import Runner
from mica.model.errors import MicaError

MAX_KILLS = 5


class Verdict(Enum):
    """``GONE``: nothing of it is left that takes a signal, so its streams will bring nothing more."""

    GONE = auto()


class Ending:
    """What was asked for and done to end one command. ``reason`` is why it is stopped, once it is to be."""

    def __init__(self, patience: Patience) -> None:
        self.reason: MicaError | None = None
        self.sent: list[int] = []
        self._patience = patience
        self._waiting: list[int] = []
        self._kills: list[float] = []
        self._asked: float | None = None
        self._start_ticks = ""

    @property
    def begun(self) -> bool:
        return bool(self._kills)

    @property
    def overdue(self) -> bool:
        """It should have been stopped long ago."""
        return self._asked is not None and time.monotonic() - self._asked > self._patience.give_up_s

    def signal_soon(self, signal: int) -> None:
        self._waiting.append(signal)

    def stop_soon(self, reason: MicaError) -> None:
        """SIGTERM, after a grace SIGKILL, until nothing is left."""
        if self.reason is None:
            self.reason, self._asked = reason, time.monotonic()

    async def act(self, runner: Runner, events: CommandEvents) -> Verdict | MicaError | None:
        """Do what is due. An error is why the exec is given up."""
        if events.pid is None:
            if self.reason is not None and events.started:
                return outcome.no_proc(runner.agent.guest)
            return None
        if events.exit_code is None:
            while self._waiting:
                await self.send(runner, events.pid, self._waiting.pop(0))
        if self.reason is not None:
            return await self._escalate(runner, events, events.pid)
        return None

    async def _escalate(self, runner: Runner, events: CommandEvents, pid: int) -> Verdict | MicaError | None:
        now = time.monotonic()
        if not self._kills:
            self._kills.append(now)
            await self.send(runner, pid, signals.SIGTERM)
            return None
        if now - self._kills[-1] < (self._patience.grace_s if len(self._kills) == 1 else self._patience.linger_s):
            return None
        self._kills.append(now)
        left = await self.send(runner, pid, signals.SIGKILL)
        if events.exit_code is not None and not left:
            return Verdict.GONE
        return outcome.unkillable(runner.agent.guest, pid) if len(self._kills) > MAX_KILLS else None

    async def send(self, runner: Runner, pid: int, signal: int) -> int:
        """How many processes took it."""
        self.sent.append(signal)
        count, self._start_ticks = await runner.signal(signal, pid, self._start_ticks)
        return count
