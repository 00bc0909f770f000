"""Commands in a guest: what was asked for, and what became of it.

::

    starting ──▶ running ──▶ exited     it ended by itself
        │           ├──────▶ killed     it was told to end, by a person or by its time-out
        ├───────────┼──────▶ failed     it never ran, or Mica had to give it up; ``error`` says why
        └───────────┴──────▶ lost       the guest that ran it is gone; the output up to then is kept
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mica.model.errors import Problem, invalid
from mica.model.units import KIB

MAX_COMMAND = 120 * KIB
"""Bytes of arguments and environment together: what Linux grants on a small stack, with room for the shell."""


class ExecState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"
    FAILED = "failed"
    KILLED = "killed"
    LOST = "lost"

    @property
    def final(self) -> bool:
        return self not in (ExecState.STARTING, ExecState.RUNNING)


class ExecSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A command. ``user`` is a name or number, optionally ``:group``; ``None`` is the agent's own, root.

    ``cwd`` ``None`` is the user's home, or ``/`` where there is none. ``env`` is added to PATH, HOME, USER, LOGNAME and
    SHELL. ``stdin`` false reads from /dev/null. ``timeout_s`` counts from the start; ``None`` is without end.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    stdin: bool = False
    timeout_s: float | None = None


class ExecView(msgspec.Struct, frozen=True, kw_only=True):
    """A command and what became of it.

    Times are Unix seconds. ``exit_code`` follows the shell: 128 + n for a command ended by signal n, and then
    ``signal`` is n. ``reduced`` says what the guest could not give, for people.
    """

    id: str
    vm_id: str
    spec: ExecSpec
    state: ExecState = ExecState.STARTING
    exit_code: int | None = None
    signal: int | None = None
    started_at: float = 0.0
    ended_at: float | None = None
    error: Problem | None = None
    reduced: str = ""


class ExecRecord(ExecView, frozen=True, kw_only=True):
    """An exec as it is kept: all that a new daemon needs to find it again in the guest.

    ``guest_dir`` and ``guest_pid`` are the runner in the guest that executes it as its ``sequence``-th command, ``pid``
    the command itself; ``out_start`` and ``err_start`` are where its output begins in the runner's first segments.
    """

    guest_dir: str = ""
    guest_pid: int = 0
    sequence: int = 0
    out_start: int = 0
    err_start: int = 0
    pid: int | None = None

    def view(self) -> ExecView:
        """What users see of it: nothing of how it is run."""
        return ExecView(**{name: getattr(self, name) for name in ExecView.__struct_fields__})


def check_exec(spec: ExecSpec) -> ExecSpec:
    """Return ``spec`` if a guest can be given it. Raises ``invalid``, naming what is wrong."""
    if not spec.argv or not spec.argv[0]:
        raise invalid("there is no command", hint="name a program, for example: uname -a")
    texts = [*spec.argv, *spec.env, *spec.env.values(), spec.cwd or "", spec.user or ""]
    if any("\0" in text for text in texts):
        raise invalid("a command, its environment, directory and user cannot contain a NUL byte")
    try:
        size = sum(len(text.encode()) + 1 for text in texts)
    except UnicodeEncodeError as error:
        raise invalid("a command must be valid Unicode: the guest agent speaks JSON") from error
    if size > MAX_COMMAND:
        raise invalid(
            f"the command is {size} bytes long, at most {MAX_COMMAND} fit",
            hint="copy the data into the guest as a file, or send it by standard input",
        )
    if bad := next((name for name in spec.env if not name or "=" in name), None):
        raise invalid(f"{bad!r} is not the name of an environment variable")
    if spec.user is not None and (
        not spec.user or spec.user.startswith(("-", ":")) or set(spec.user) & set(" \n\t/'\"")
    ):
        raise invalid(f"{spec.user!r} is not a user", hint="write a name or number, optionally with :group")
    if spec.timeout_s is not None and not 0 < spec.timeout_s < 10**9:
        raise invalid(f"a time-out of {spec.timeout_s} s is not possible", hint="leave it out for none")
    return spec
