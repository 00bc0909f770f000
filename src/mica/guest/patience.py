"""How long an exec waits for what."""

from __future__ import annotations

import msgspec


class Patience(msgspec.Struct, frozen=True):
    """In seconds.

    ``linger_s``: for output that something in the background holds open after the command has ended. ``grace_s``:
    between SIGTERM and SIGKILL. ``alive_s``: of silence before we look whether the runner still exists. ``start_s``:
    for a command to begin. ``give_up_s``: for an agent that does not answer, once the command is to be stopped.
    """

    linger_s: float = 2.0
    grace_s: float = 5.0
    alive_s: float = 5.0
    start_s: float = 10.0
    give_up_s: float = 30.0
