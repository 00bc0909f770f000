"""``vm.pause`` and ``vm.resume``: hold the vCPUs, let them go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from mica.engine.definition import Context, Definition, NoParams, Proposal, Step
from mica.engine.settle import moved, set_state
from mica.model.errors import Code, MicaError
from mica.model.transitions import VmVerb
from mica.model.vm import Power, VmState
from mica.ports.hypervisor import Machine


async def _intend(proposal: Proposal, power: Power) -> None:
    assert proposal.vm is not None
    wanted = msgspec.structs.replace(proposal.vm.value, intent=power)
    proposal.draft.put(proposal.env.records.vms, wanted.id, wanted, proposal.vm.generation)


async def plan_pause(proposal: Proposal) -> None:
    await _intend(proposal, Power.PAUSED)


async def plan_resume(proposal: Proposal) -> None:
    await _intend(proposal, Power.RUNNING)


async def _machine(context: Context) -> Machine:
    machine = await context.env.machines.attach(context.vm_id)
    if machine is None:
        raise MicaError(Code.STATE_CONFLICT, f"VM {context.operation.target_name} has just ended", hint="start it")
    return machine


async def hold(context: Context) -> None:
    await (await _machine(context)).pause()
    await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.PAUSED, "paused on request"))


async def let_go(context: Context) -> None:
    await (await _machine(context)).resume()
    await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.RUNNING))


async def undo_hold(context: Context) -> None:
    await _unless_ended(context, let_go)


async def undo_let_go(context: Context) -> None:
    await _unless_ended(context, hold)


async def _unless_ended(context: Context, back: Callable[[Context], Awaitable[None]]) -> None:
    """A machine that has ended needs nothing taken back; its actor says how it ended."""
    machines = context.env.machines
    try:
        if await machines.attach(context.vm_id) is not None:
            await back(context)
    except MicaError:
        if not await machines.ended(context.vm_id):
            raise


PAUSE = (Step("pause", hold, undo_hold, timeout_s=30.0, words="holding its vCPUs"),)
RESUME = (Step("resume", let_go, undo_let_go, timeout_s=30.0, words="letting its vCPUs go"),)

PAUSE_DEFINITION = Definition(
    verb=VmVerb.PAUSE, noun="vm", params=NoParams, plan=plan_pause, steps=lambda _: PAUSE, state_verb=VmVerb.PAUSE
)
RESUME_DEFINITION = Definition(
    verb=VmVerb.RESUME, noun="vm", params=NoParams, plan=plan_resume, steps=lambda _: RESUME, state_verb=VmVerb.RESUME
)
