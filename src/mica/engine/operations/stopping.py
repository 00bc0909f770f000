"""The steps that bring a VM down, shared by every verb that does."""

from __future__ import annotations

import msgspec
import structlog

from mica.engine.deadline import within
from mica.engine.definition import Context, Step
from mica.engine.settle import moved, set_state, stopped, take_down
from mica.model.errors import MicaError
from mica.model.transitions import LIVE
from mica.model.units import format_duration
from mica.model.vm import AgentState, VmState
from mica.ports.hypervisor import Machine, RunState

log = structlog.get_logger()
replace = msgspec.structs.replace

# A guest that has begun to power off may still need a forced end; nothing waits longer than this beyond its time-out.
MARGIN_S = 60.0


class How(msgspec.Struct, frozen=True):
    """Which way a VM stopped: ``guest`` (it was asked and did), ``forced``, ``already`` (nothing ran)."""

    how: str
    after_s: float = 0.0


async def begin(context: Context) -> None:
    status = (await context.env.records.statuses.need(context.vm_id)).value
    if status.observed.state in LIVE:
        await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.STOPPING))


async def undo_begin(context: Context) -> None:
    """A stop that was called off: the machine is looked at, and what it does now is what it is."""
    machine = await context.env.machines.attach(context.vm_id)
    status = (await context.env.records.statuses.need(context.vm_id)).value
    if machine is None or status.observed.state is not VmState.STOPPING:
        return
    seen = await machine.observe()
    state = VmState.RUNNING if seen.run is RunState.RUNNING else VmState.PAUSED
    await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, state))


async def _ask(context: Context, machine: Machine) -> str:
    """Ask the guest to power off, by the agent where it answers and by the power button; return which was asked."""
    status = (await context.env.records.statuses.need(context.vm_id)).value
    if status.runtime is not None and status.observed.agent is AgentState.READY:
        try:
            await context.env.guests.shutdown(context.vm_id, status.runtime)
        except MicaError as error:
            log.info("the agent did not take the shutdown", vm=context.vm_id, error=error.message)
        else:
            return "agent"
    await machine.power_button()
    return "power button"


async def halt(context: Context) -> How:
    """Ask, wait, force. A paused guest cannot hear: it runs again for its own shutdown."""
    clock = context.env.clock
    machine = await context.env.machines.attach(context.vm_id)
    if machine is None:
        return How("already")
    vm = (await context.env.records.vms.need(context.vm_id)).value
    asked = context.operation.params.get("timeout_s")
    timeout_s = vm.spec.stop_timeout_s if asked is None else float(asked)
    began = clock.monotonic()
    if not context.operation.params.get("force") and timeout_s > 0:
        try:
            async with within(clock, timeout_s):
                if (await machine.observe()).run is RunState.PAUSED:
                    await machine.resume()
                how = await _ask(context, machine)
                context.report(None, f"asked the guest by {how}; forcing after {format_duration(timeout_s)}")
                await machine.ended()
            return How("guest", clock.monotonic() - began)
        except TimeoutError:
            context.report(None, "the guest did not react; forcing")
    await machine.kill()
    return How("forced", clock.monotonic() - began)


async def release(context: Context) -> None:
    how = context.output("halt", How)
    if how.how == "already":
        status = (await context.env.records.statuses.need(context.vm_id)).value
        if status.observed.state not in LIVE:
            return
    await take_down(context.env, context.vm_id, clean=how.how == "guest")
    words = {
        "guest": f"the guest shut down after {format_duration(how.after_s)}",
        "forced": "forced" if how.after_s < 1 else f"forced after {format_duration(how.after_s)}",
        "already": "its process was gone",
    }
    await stopped(context.env, context.vm_id, VmState.STOPPED, words[how.how])


STOP: tuple[Step, ...] = (
    Step("stop-begin", begin, undo_begin),
    # Beyond the guest's own time-out the step ends by force; the deadline here is only for a host that hangs.
    Step("halt", halt, timeout_s=86400.0 + MARGIN_S),
    Step("release", release, cancellable=False),
)
