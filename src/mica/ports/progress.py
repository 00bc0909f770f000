"""Progress of long work: how adapters tell what they are doing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called often by long work; must be cheap. Cancelling the awaiting task is how work is cancelled."""

    def __call__(self, fraction: float | None, text: str, /) -> None:
        """``fraction`` is 0.0 to 1.0, or ``None`` when the end is not known; ``text`` says the present step."""


def no_progress(fraction: float | None, text: str, /) -> None:
    """For callers who do not look."""
