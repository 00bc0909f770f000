"""When snapshots are taken by themselves, and which of them are kept.

``24h,7d,4w`` keeps the last snapshot of each of 24 hours, of each of 7 days and of each of 4 weeks. Only hours, days
and weeks count in which there is a snapshot: a VM that was off for a month loses nothing by that. Hours, days and weeks
(which begin on Monday) are those of UTC, so that no change of a clock moves them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import msgspec

from mica.model.errors import invalid

MIN_EVERY_S = 60.0
MAX_EVERY_S = 366 * 86400.0
# A VM may have a thousand snapshots, and others are to have room.
MAX_KEPT = 500
MAX_SCHEDULES = 1000

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_WORD = re.compile(r"^([1-9]\d{0,3})([mhdw])$")
# 1970-01-05 was the first Monday (1970-01-01 a Thursday).
_MONDAY_S = 4 * 86400


class Keep(msgspec.Struct, frozen=True):
    """The last snapshot of each of the last ``count`` spans of ``unit`` (``m``, ``h``, ``d``, ``w``) that have any."""

    count: int
    unit: str

    def span(self, at: float) -> int:
        """The number of the span in which a moment lies."""
        size = _UNITS[self.unit]
        return math.floor((at - (_MONDAY_S if self.unit == "w" else 0)) / size)


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots of one VM (``vm_id``), or of all that have a label (``label``: its key, ``value`` too unless empty).

    They are due at ``created_at`` and every ``every_s`` seconds from then on. ``last`` is the moment that was last seen
    to for each VM; of several that were missed only the latest counts.
    """

    id: str
    every_s: float
    keep: tuple[Keep, ...]
    created_at: float
    created_by: str
    vm_id: str = ""
    label: str = ""
    value: str = ""
    memory: bool = True
    last: dict[str, float] = {}

    def due(self, now: float) -> float:
        """The latest moment at which a snapshot was due; before ``created_at`` when there was none."""
        return self.created_at + math.floor((now - self.created_at) / self.every_s) * self.every_s

    def following(self, now: float) -> float:
        return max(self.created_at, self.due(now) + self.every_s)

    def covers(self, vm_id: str, labels: Mapping[str, str]) -> bool:
        if self.vm_id:
            return self.vm_id == vm_id
        return self.label in labels and self.value in ("", labels[self.label])


class Taken(msgspec.Struct, frozen=True):
    """What is known of one snapshot. ``good``: complete, with nothing found wrong."""

    at: float
    good: bool = True
    protected: bool = False


def parse_keep(text: str) -> tuple[Keep, ...]:
    """``24h,7d,4w``. Raises ``invalid``."""
    rules = []
    for word in text.replace(" ", "").split(","):
        match = _WORD.fullmatch(word)
        if match is None:
            raise invalid(
                f"{text!r} does not say which snapshots to keep",
                hint="write for example 24h,7d,4w: hourly, daily, weekly",
            )
        rules.append(Keep(int(match[1]), match[2]))
    if len({rule.unit for rule in rules}) < len(rules):
        raise invalid(f"{text!r} names a unit twice", hint="write each of m, h, d and w once at most")
    if sum(rule.count for rule in rules) > MAX_KEPT:
        raise invalid(f"{text!r} keeps more than {MAX_KEPT} snapshots", hint="keep fewer")
    return tuple(rules)


def format_keep(rules: Collection[Keep]) -> str:
    return ",".join(f"{rule.count}{rule.unit}" for rule in rules)


def check_every(every_s: float) -> float:
    """Raises ``invalid``."""
    if not MIN_EVERY_S <= every_s <= MAX_EVERY_S:
        raise invalid(
            f"every {every_s:g} s is not between {MIN_EVERY_S:g} s and a year",
            hint="write for example 1h",
        )
    return every_s


def kept(moments: Mapping[str, float], rules: Collection[Keep]) -> set[str]:
    """Ids of those that the rules keep. What is taken away later is never needed again: whether a rule is applied after
    each snapshot or once after all, the same ones are left."""
    newest_first = sorted(moments, key=lambda id_: (moments[id_], id_), reverse=True)
    chosen = set()
    for rule in rules:
        spans: set[int] = set()
        for id_ in newest_first:
            span = rule.span(moments[id_])
            if span in spans:
                continue
            if len(spans) == rule.count:
                break
            spans.add(span)
            chosen.add(id_)
    return chosen


def expired(snapshots: Mapping[str, Taken], rules: Collection[Keep]) -> set[str]:
    """Ids of those that are to go. A damaged one takes no good one's place; no protected one goes, nor the last good
    one."""
    all_ = {id_: taken.at for id_, taken in snapshots.items()}
    good = {id_: at for id_, at in all_.items() if snapshots[id_].good}
    protected = {id_ for id_, taken in snapshots.items() if taken.protected}
    return all_.keys() - kept(all_, rules) - kept(good, rules) - protected


class ScheduleCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/schedules``: snapshots of a VM (``vm``, its name or id), or of all that have a ``label``
    (``KEY`` or ``KEY=VALUE``), every so many seconds, the first one at once.

    ``keep`` tells which stay: ``24h,7d,4w`` is the last of each of 24 hours, 7 days and 4 weeks. ``memory``: with the
    memory of VMs that run.
    """

    vm: str = ""
    label: str = ""
    every_s: float = 3600.0
    keep: str = "24h,7d,4w"
    memory: bool = True


class ScheduleView(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule: ``target`` is the name of its VM, or its label; ``keep`` as it is written. ``next_at`` is when it
    has snapshots taken next, ``vms`` are the names of those it covers now, ``snapshots`` counts those it has."""

    schedule: Schedule
    generation: int
    target: str
    keep: str
    next_at: float
    vms: tuple[str, ...]
    snapshots: int


class SchedulePage(msgspec.Struct, frozen=True, kw_only=True):
    """Schedules, oldest first."""

    revision: int
    items: tuple[ScheduleView, ...]
