"""Ctrl-C and its relatives: the first asks, the next insist.

A signal cancels the command's task, unless something that is going on wants it for itself (``taken_by``): a running
guest command gets it passed on. What is cancelled cleans up and lets the cancellation through.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

Hook = Callable[[int], bool]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Delivers signals to one task. ``last`` is the signal that came last, ``None`` before the first."""

    def __init__(self) -> None:
        self.last: int | None = None
        self._hooks: list[Hook] = []
        self._task: asyncio.Task[Any] | None = None

    @property
    def exit_status(self) -> int:
        """128 and the signal, as shells count (POSIX Shell Command Language, section 2.8.2)."""
        return 128 + (self.last or signal.SIGINT)

    @property
    def hurried(self) -> bool:
        """Whether somebody wants us gone at once, and not just this work cancelled."""
        return self.last not in (None, signal.SIGINT)

    def deliver(self, signum: int) -> None:
        self.last = signum
        for hook in reversed(self._hooks):
            if hook(signum):
                return
        if self._task is not None:
            self._task.cancel()

    @contextmanager
    def taken_by(self, hook: Hook) -> Iterator[None]:
        """Within, ``hook`` gets each signal first; what it returns ``False`` for goes on to the next."""
        self._hooks.append(hook)
        try:
            yield
        finally:
            self._hooks.remove(hook)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the process's signals for the current task; in a thread that gets none, do nothing."""
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        main = threading.current_thread() is threading.main_thread()
        for signum in SIGNALS if main else ():
            loop.add_signal_handler(signum, self.deliver, signum)
        try:
            yield
        finally:
            for signum in SIGNALS if main else ():
                loop.remove_signal_handler(signum)
            self._task = None

    def run(self, work: Coroutine[Any, Any, int | None]) -> int:
        """Run a command to its exit status."""

        async def watched() -> int | None:
            with self.listening():
                return await work

        try:
            return asyncio.run(watched()) or 0
        except asyncio.CancelledError:
            return self.exit_status


def absorb_cancellation() -> None:
    """Forget one cancellation of the current task, so that ``asyncio.timeout`` and task groups work after it."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
