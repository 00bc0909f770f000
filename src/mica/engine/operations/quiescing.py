"""A guest's file systems stand still while a snapshot is taken, and are let go whatever becomes of it.

That they may be frozen is written down before the guest is asked, and taken back only once it has said that they are
not. So a daemon that dies in between, a guest that does not answer, and a snapshot that fails leave a note, by which
:mod:`mica.engine.reconcilers.thaw` goes on asking.
"""

from __future__ import annotations

import msgspec
import structlog

from mica.engine.deadline import within
from mica.engine.definition import Context, Env, Proposal
from mica.model.errors import Code, MicaError, invalid
from mica.model.units import format_duration
from mica.model.vm import Vm, VmState, VmStatus

log = structlog.get_logger()
replace = msgspec.structs.replace

# The guest writes out what it has in memory first. Seconds.
FREEZE_S = 30.0
# For one attempt; thawing itself takes no time. Seconds.
THAW_S = 10.0

_WITHOUT = "make the snapshot without --quiesce, or see what the guest is doing: `mica console"


def check_can_freeze(proposal: Proposal, vm: Vm) -> None:
    """Raises ``invalid``, ``state-conflict`` when the guest could not be asked to. One that is stopped need not be."""
    if not vm.spec.agent:
        raise invalid(f"VM {vm.name} has no guest agent that could freeze its file systems", hint="leave --quiesce out")
    if proposal.status is not None and proposal.status.value.observed.state is VmState.PAUSED:
        raise _paused(vm.name)


def _paused(name: str) -> MicaError:
    return MicaError(
        Code.STATE_CONFLICT,
        f"VM {name} is paused: its guest cannot freeze its file systems",
        hint=f"resume it first (`mica vm resume {name}`), or leave --quiesce out",
    )


async def freeze(context: Context) -> int | None:
    """Returns how many file systems the guest has frozen; ``None`` when that was not wanted or it does not run."""
    env, vm_id, name = context.env, context.vm_id, context.operation.target_name
    found = context.outputs["look"]
    if not context.operation.params["quiesce"] or not found["live"]:
        return None
    if not found["running"]:
        raise _paused(name)

    def note(status: VmStatus) -> VmStatus:
        if status.frozen not in ("", context.operation.id):
            raise MicaError(
                Code.STATE_CONFLICT,
                f"the guest of {name} has not thawed its file systems since an earlier snapshot",
                hint=f"{_WITHOUT} {name}`",
                retryable=True,
            )
        return replace(status, frozen=context.operation.id)

    runtime = (await env.records.statuses.update(vm_id, note)).value.runtime
    assert runtime is not None
    try:
        async with within(env.clock, FREEZE_S):
            return await env.guests.freeze(vm_id, runtime)
    except TimeoutError as error:
        raise MicaError(
            Code.TIMEOUT,
            f"the guest of {name} did not freeze its file systems within {format_duration(FREEZE_S)}",
            hint=f"{_WITHOUT} {name}`",
            retryable=True,
        ) from error
    except MicaError as error:
        raise MicaError(
            error.code,
            f"the file systems of {name} could not be frozen: {error.message}",
            hint=error.hint or f"{_WITHOUT} {name}`",
            retryable=error.retryable,
            details=error.details,
        ) from error


async def thaw(context: Context) -> bool:
    """The machine runs again. Whether all is thawed now; otherwise it is asked until it is."""
    return await let_go(context.env, context.vm_id)


async def undo_freeze(context: Context) -> None:
    await let_go(context.env, context.vm_id)


async def let_go(env: Env, vm_id: str) -> bool:
    """Have the guest thaw what may be frozen. ``False`` when it did not say so: it is asked again later."""
    row = await env.records.statuses.get(vm_id)
    if row is None or not row.value.frozen or row.value.runtime is None:
        return True
    try:
        async with within(env.clock, THAW_S):
            await env.guests.thaw(vm_id, row.value.runtime)
    except (MicaError, TimeoutError) as error:
        log.warning("a guest does not thaw its file systems", vm=vm_id, error=str(error) or "it does not answer")
        return False
    who = row.value.frozen
    await env.records.statuses.update(vm_id, lambda s: replace(s, frozen="") if s.frozen == who else s)
    return True
