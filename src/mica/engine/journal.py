"""The pure rule of a saga's journal: what it says has happened, and so what must happen next.

For each step: ``started`` → ``succeeded`` | ``failed``; and once any step has failed, for every step that started, last
first: ``undo-started`` → ``undo-finished`` | ``undo-failed``. A step that started and has no ending is done again (its
``do`` can be repeated); an undo that started and has no ending is undone again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from mica.model.operation import JournalEntry, StepEvent

E = StepEvent

# What may follow the last event of the same step; ``None`` is "nothing yet".
MAY_FOLLOW: dict[StepEvent | None, frozenset[StepEvent]] = {
    None: frozenset({E.STARTED}),
    E.STARTED: frozenset({E.STARTED, E.SUCCEEDED, E.FAILED, E.UNDO_STARTED}),
    E.SUCCEEDED: frozenset({E.UNDO_STARTED}),
    E.FAILED: frozenset({E.UNDO_STARTED}),
    E.UNDO_STARTED: frozenset({E.UNDO_STARTED, E.UNDO_FINISHED, E.UNDO_FAILED}),
    E.UNDO_FAILED: frozenset({E.UNDO_STARTED, E.UNDO_FINISHED}),
    E.UNDO_FINISHED: frozenset(),
}


class Next(StrEnum):
    DO = "do"
    UNDO = "undo"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STUCK = "stuck"


class Action(msgspec.Struct, frozen=True):
    """What to do next, and for ``do`` and ``undo`` with which step."""

    next: Next
    step: str = ""


class IllegalJournal(Exception):  # noqa: N818
    """The journal says something impossible: it was written by something else, or it is damaged."""


def last_events(journal: Sequence[JournalEntry]) -> dict[str, StepEvent]:
    """The last event of every step, checked entry by entry. Raises :class:`IllegalJournal`."""
    last: dict[str, StepEvent] = {}
    for entry in journal:
        if entry.event not in MAY_FOLLOW[last.get(entry.step)]:
            raise IllegalJournal(f"step {entry.step}: {entry.event} after {last.get(entry.step)}")
        last[entry.step] = entry.event
    return last


def next_action(steps: Sequence[str], journal: Sequence[JournalEntry], *, unwind: bool = False) -> Action:
    """What follows ``journal`` in a saga of ``steps``. ``unwind`` asks to go back although no step has failed."""
    last = last_events(journal)
    if unknown := last.keys() - set(steps):
        raise IllegalJournal(f"unknown steps: {', '.join(sorted(unknown))}")
    if E.UNDO_FAILED in last.values():
        return Action(Next.STUCK, next(s for s, e in last.items() if e is E.UNDO_FAILED))
    backwards = {E.FAILED, E.UNDO_STARTED, E.UNDO_FINISHED}
    if unwind or backwards & set(last.values()):
        for step in reversed(steps):
            if step in last and last[step] is not E.UNDO_FINISHED:
                return Action(Next.UNDO, step)
        return Action(Next.FAILED)
    for step in steps:
        if last.get(step) is not E.SUCCEEDED:
            return Action(Next.DO, step)
    return Action(Next.SUCCEEDED)


def outputs(journal: Sequence[JournalEntry]) -> dict[str, object]:
    """What the steps that succeeded returned, by step."""
    return {entry.step: entry.output for entry in journal if entry.event is E.SUCCEEDED}
