"""Operations: what Mica is doing about a difference, durable from the moment it is accepted.

    queued ──► running ──► succeeded
                  │  └───► unwinding ──► failed | cancelled
                  │             └──────► stuck     (an undo failed: an operator decides)
    queued ────────────────────────────► cancelled

The journal is a list of step events; :mod:`mica.engine.journal` is the pure rule of what may follow what.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from mica.model.errors import Problem


class OperationState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    UNWINDING = "unwinding"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STUCK = "stuck"

    @property
    def ended(self) -> bool:
        """No step will run any more. A stuck operation has ended only when an operator resolves it."""
        return self in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)


class StepEvent(StrEnum):
    STARTED = "started"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNDO_STARTED = "undo-started"
    UNDO_FINISHED = "undo-finished"
    UNDO_FAILED = "undo-failed"


class JournalEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of one step. ``at`` is Unix time in seconds; ``output`` is what the step returned, as plain JSON."""

    step: str
    event: StepEvent
    at: float
    output: Any = None
    error: str = ""


class Actor(msgspec.Struct, frozen=True):
    """Who asked: ``name`` for people, ``source`` where from (``unix:uid=0``, ``token``, ``reconciler:reaper``)."""

    name: str
    source: str = ""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One verb on one thing. ``target`` is ``noun/id``; ``params`` are the verb's parameters as plain JSON.

    ``progress`` is 0.0 to 1.0 or ``None``; ``step`` says in words what it is doing now. ``result`` is what the verb
    returns, ``problem`` why it failed. Times are Unix seconds.
    """

    id: str
    verb: str
    target: str
    target_name: str
    params: dict[str, Any]
    by: Actor
    state: OperationState = OperationState.QUEUED
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    journal: tuple[JournalEntry, ...] = ()
    progress: float | None = None
    step: str = ""
    cancel_requested: bool = False
    result: dict[str, Any] = {}
    problem: Problem | None = None
