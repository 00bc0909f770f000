"""What became of a command, in the words of its record."""

from __future__ import annotations

import signal as signals
from collections.abc import Sequence

from msgspec.structs import replace

from mica.guest.log import CommandEvents
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecRecord, ExecState
from mica.model.units import format_duration


def ended(
    record: ExecRecord, events: CommandEvents, sent: Sequence[int], stopping: MicaError | None, guest: str
) -> ExecRecord:
    """The record of a command that has ended, or that could not be started."""
    code = events.exit_code
    signal = code - 128 if code is not None and 128 < code < 128 + signals.NSIG else None
    record = replace(record, exit_code=code, signal=signal)
    if events.never_ran:
        return replace(record, state=ExecState.FAILED, signal=None, error=_never_ran(record, events, guest).problem())
    if stopping is not None:
        return replace(record, state=ExecState.KILLED, error=stopping.problem())
    state = ExecState.KILLED if signal is not None and signal in sent else ExecState.EXITED
    return replace(record, state=state)


def lost(record: ExecRecord, reason: str) -> ExecRecord:
    error = MicaError(
        Code.GONE,
        f"the command was lost: {reason}",
        hint="what it had written until then is kept; start it again",
    )
    return replace(record, state=ExecState.LOST, error=error.problem())


def failed(record: ExecRecord, error: MicaError) -> ExecRecord:
    return replace(record, state=ExecState.FAILED, error=error.problem())


def _never_ran(record: ExecRecord, events: CommandEvents, guest: str) -> MicaError:
    spec = record.spec
    match events.never_ran:
        case "program":
            return MicaError(
                Code.NOT_FOUND, f"there is no program {spec.argv[0]!r} in {guest}", hint="give its whole path"
            )
        case "cwd":
            return MicaError(Code.NOT_FOUND, f"there is no directory {spec.cwd!r} to be in, in {guest}")
        case "user":
            return MicaError(Code.NOT_FOUND, f"there is no user {spec.user!r} in {guest}")
        case "setpriv":
            return MicaError(
                Code.AGENT_FAILED,
                f"{guest} has no program that can switch to {spec.user!r}",
                hint="install util-linux there (setpriv); su alone can only switch to a user that has a name",
            )
        case reason:
            return MicaError(Code.AGENT_FAILED, f"the command could not be started in {guest}: {reason}")


def timed_out(timeout_s: float) -> MicaError:
    return MicaError(
        Code.TIMEOUT,
        f"the command did not end within {format_duration(timeout_s)} and was stopped",
        hint="give it more time",
        details={"timeout_s": timeout_s},
    )


def guest_full(guest: str) -> MicaError:
    return MicaError(
        Code.INSUFFICIENT_DISK,
        f"the command's output found no space in {guest}",
        hint="free some under /run (or /tmp) there, or give the VM more memory",
    )


def no_proc(guest: str) -> MicaError:
    return MicaError(
        Code.AGENT_FAILED, f"{guest} has no /proc: the command cannot be stopped from outside", hint="mount it there"
    )


def unkillable(guest: str, pid: int) -> MicaError:
    return MicaError(
        Code.AGENT_FAILED,
        f"process {pid} in {guest} does not end, not even by SIGKILL",
        hint="it waits for a device or file system there; restart the VM",
    )
