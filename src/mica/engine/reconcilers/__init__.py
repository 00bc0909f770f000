"""Loops that bring the world to what the store says, or the store to what is seen.

Each takes no arguments, looks at everything it cares for each time, may run twice or be killed anywhere, and does not
retry within: the next round is the retry. :class:`Loop` runs one; ``status`` says how its last round went.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from mica.engine.deadline import within
from mica.engine.definition import Env
from mica.engine.reconcilers import (
    actors,
    autostart,
    boots,
    guests,
    identity,
    images,
    ledger,
    leftovers,
    merge,
    parts,
    recheck,
    retention,
    schedules,
    scrub,
    standby,
    thaw,
    trash,
    usage,
)
from mica.model.errors import MicaError
from mica.model.units import format_duration
from mica.ports.clock import Clock

if TYPE_CHECKING:
    from mica.engine.engine import Engine

log = structlog.get_logger()

# No round may take longer; what it has not come to is the next one's. Seconds.
ROUND_S = 600.0
# Reading slowly what is large takes its time.
SCRUB_S = 86400.0
# Listing what is there does not: a file system that does not answer is asked again.
LIST_S = 60.0
# A round that failed is not waited for as long as one that found everything in order.
RETRY_S = 30.0


class LoopStatus(msgspec.Struct, frozen=True):
    """``rounds`` so far, when the last ended (Unix seconds), what it said or why it failed."""

    rounds: int = 0
    at: float = 0.0
    said: str = ""
    failed: str = ""


class Loop:
    """Runs ``work`` every ``period_s`` seconds, first after ``first_s``; a round ends after ``round_s``.

    After a round that failed the next one comes within ``RETRY_S``.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[str]],
        clock: Clock,
        period_s: float,
        first_s: float,
        round_s: float = ROUND_S,
    ) -> None:
        self.name = name
        self.status = LoopStatus()
        self.work = work
        self._clock = clock
        self._period_s = period_s
        self._first_s = first_s
        self._round_s = round_s

    async def once(self) -> None:
        try:
            async with within(self._clock, self._round_s):
                said, failed = await self.work(), ""
        except (MicaError, TimeoutError) as error:
            said, failed = "", str(error) or f"a round took longer than {format_duration(self._round_s)}"
            log.warning("reconciler", name=self.name, error=failed)
        except Exception as error:  # the root of this task: the next round is the retry
            said, failed = "", f"{type(error).__name__}: {error}"
            log.exception("reconciler", name=self.name)
        if said:
            log.info("reconciler", name=self.name, did=said)
        self.status = LoopStatus(self.status.rounds + 1, self._clock.now(), said, failed)

    async def run(self) -> None:
        await self._clock.sleep(self._first_s)
        while True:
            await self.once()
            await self._clock.sleep(min(self._period_s, RETRY_S) if self.status.failed else self._period_s)


def make_loops(env: Env, engine: Engine) -> list[Loop]:
    """Every loop of the engine, in no particular order."""
    return [
        Loop("autostart", lambda: autostart.reconcile(env, engine), env.clock, 5.0, 0.0),
        Loop("images", lambda: images.reconcile(env), env.clock, 3600.0, 0.0, LIST_S),
        Loop("leftovers", lambda: leftovers.reconcile(env), env.clock, 300.0, 2.0),
        Loop("ledger", lambda: ledger.reconcile(env), env.clock, 60.0, 5.0),
        Loop("usage", lambda: usage.reconcile(env, engine), env.clock, 5.0, 0.5),
        Loop("guests", guests.AskGuests(env, engine).reconcile, env.clock, 2.0, 0.5),
        Loop("parts", lambda: parts.reconcile(env), env.clock, 60.0, 3.0),
        Loop("identity", lambda: identity.reconcile(env, engine), env.clock, 2.0, 0.5),
        Loop("thaw", lambda: thaw.reconcile(env, engine), env.clock, 2.0, 0.5),
        Loop("merge", lambda: merge.reconcile(env), env.clock, 60.0, 5.0, SCRUB_S),
        Loop("recheck", lambda: recheck.reconcile(env, engine), env.clock, 2.0, 1.0, SCRUB_S),
        Loop("scrub", lambda: scrub.reconcile(env), env.clock, 300.0, 120.0, SCRUB_S),
        Loop("schedules", lambda: schedules.reconcile(env, engine), env.clock, 5.0, 1.0),
        Loop("boots", lambda: boots.reconcile(env, engine), env.clock, 3.0, 5.0),
        Loop("standby", standby.KeepStandbys(env, engine).reconcile, env.clock, 2.0, 4.0),
        Loop("trash", lambda: trash.reconcile(env, engine), env.clock, 60.0, 10.0),
        Loop("retention", lambda: retention.reconcile(env), env.clock, 600.0, 20.0),
        Loop("actors", lambda: actors.reconcile(engine), env.clock, 30.0, 30.0),
    ]
