"""The steps that bring a VM down, shared by every verb that does."""

from __future__ import annotations

import msgspec
import structlog

from mica.engine.deadline import within
from mica.engine.definition import Context, Step
from mica.engine.settle import moved, set_state, stopped, take_down
from mica.model.errors import Code, MicaError
from mica.model.transitions import LIVE
from mica.model.units import format_duration
from mica.model.vm import AgentState, VmState
from mica.ports.hypervisor import Exit, Machine, RunState

log = structlog.get_logger()
# How long the end of a process may take once it was told to end. Seconds.
MARGIN_S = 60.0
# How long to wait before a guest that could not be asked is asked again. Seconds.
ASK_AGAIN_S = 2.0
# How long a guest that was asked may take before it is asked again. Seconds.
REPEAT_S = 5.0


class How(msgspec.Struct, frozen=True):
    """Which way a VM stopped: ``guest`` (it was asked and did), ``forced``, ``already`` (nothing ran).

    ``clean``: its QEMU ended in order, so its disks need no check.
    """

    how: str
    after_s: float = 0.0
    clean: bool = False


async def begin(context: Context) -> None:
    status = (await context.env.records.statuses.need(context.vm_id)).value
    if status.observed.state in LIVE:
        await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.STOPPING))


async def undo_begin(context: Context) -> None:
    """A stop that was called off: the machine is looked at, and what it does now is what it is."""
    env, vm_id = context.env, context.vm_id
    status = await env.records.statuses.get(vm_id)
    if status is None or status.value.observed.state is not VmState.STOPPING:
        return
    try:
        machine = await env.machines.attach(vm_id)
        if machine is None:
            return  # the VM's actor sees that next, and says how it ended
        seen = await machine.observe()
    except MicaError:
        if await env.machines.ended(vm_id):
            return
        raise
    state = VmState.RUNNING if seen.run is RunState.RUNNING else VmState.PAUSED
    await set_state(env, vm_id, lambda o: moved(env, o, state))


async def _ask(context: Context, machine: Machine) -> str:
    """Ask the guest to power off, by the agent where it answers and by the power button; return which was asked."""
    if (await machine.observe()).run is RunState.PAUSED:
        await machine.resume()
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


async def _persuade(context: Context, timeout_s: float) -> Exit | None:
    """Ask until somebody hears, and wait for the end. ``None``: it had ended. Raises :class:`TimeoutError`.

    A guest that still boots loses what it is asked, and nothing tells whether it heard: so it is asked again.
    """
    env, vm_id = context.env, context.vm_id
    until = f"forcing after {format_duration(timeout_s)}"
    asked = 0
    async with within(env.clock, timeout_s):
        while True:
            try:
                machine = await env.machines.attach(vm_id)
                if machine is None:
                    return await _autopsy(context) if asked else None
                how = await _ask(context, machine)
                asked += 1
                times = "" if asked == 1 else f", {asked} times by now"
                context.report(None, f"asked the guest by {how}{times}; {until}")
                gone = await _ended(context, machine, REPEAT_S)
                if gone is not None:
                    return gone
            except MicaError as error:
                if await env.machines.ended(vm_id):
                    return await _autopsy(context) if asked else None
                context.report(None, f"the guest cannot be asked ({error.message}); {until}")
                await env.clock.sleep(ASK_AGAIN_S)


async def _ended(context: Context, machine: Machine, wait_s: float) -> Exit | None:
    """How the machine ended; ``None`` if it did not within ``wait_s`` seconds."""
    deadline = None
    try:
        async with within(context.env.clock, wait_s) as deadline:
            return await machine.ended()
    except TimeoutError:
        if deadline is None or not deadline.expired():
            raise
        return None


async def _force(context: Context) -> None:
    """End the process, by its monitor if that answers."""
    env, vm_id = context.env, context.vm_id
    try:
        async with within(env.clock, MARGIN_S):
            machine = await env.machines.attach(vm_id)
            if machine is not None:
                await machine.kill()
            return
    except (MicaError, TimeoutError) as error:
        log.warning("a machine does not end by its monitor", vm=vm_id, error=str(error))
    status = await env.records.statuses.get(vm_id)
    try:
        async with within(env.clock, MARGIN_S):
            await env.hypervisor.cleanup(vm_id, status.value.runtime if status else None)
    except TimeoutError as error:
        raise MicaError(
            Code.TIMEOUT,
            f"the QEMU of VM {context.operation.target_name} did not end within {format_duration(MARGIN_S)}",
            hint="the kernel holds it, perhaps waiting for a disk: look at `dmesg`",
        ) from error


async def halt(context: Context) -> How:
    """Ask, wait, force. A paused guest cannot hear: it runs again for its own shutdown."""
    env, vm_id = context.env, context.vm_id
    vm = (await env.records.vms.need(vm_id)).value
    asked = context.operation.params.get("timeout_s")
    timeout_s = vm.spec.stop_timeout_s if asked is None else float(asked)
    began = env.clock.monotonic()
    if await _gone(context):
        return await _already(context)
    if not context.operation.params.get("force") and timeout_s > 0:
        try:
            gone = await _persuade(context, timeout_s)
        except TimeoutError:
            context.report(None, "the guest did not react; forcing")
        else:
            if gone is None:
                return await _already(context)
            return How("guest", env.clock.monotonic() - began, gone.clean)
    await _force(context)
    return How("forced", env.clock.monotonic() - began)


async def _gone(context: Context) -> bool:
    try:
        async with within(context.env.clock, MARGIN_S):
            return await context.env.machines.attach(context.vm_id) is None
    except (MicaError, TimeoutError):
        return False  # it does not answer, so it is there


async def _already(context: Context) -> How:
    gone = await _autopsy(context)
    return How("already", clean=gone is not None and gone.clean)


async def _autopsy(context: Context) -> Exit | None:
    """How it ended; ``None`` when nobody can tell."""
    status = await context.env.records.statuses.get(context.vm_id)
    runtime = status.value.runtime if status else None
    try:
        async with within(context.env.clock, MARGIN_S):
            return None if runtime is None else await context.env.hypervisor.autopsy(runtime)
    except TimeoutError as error:
        log.warning("how a machine ended cannot be read", vm=context.vm_id, error=str(error))
        return None


async def undo_halt(context: Context) -> None:
    """What is down stays down, and is put away as if the stop had gone on."""
    if "halt" in context.outputs:
        await _put_away(context, context.output("halt", How))
    elif await context.env.machines.ended(context.vm_id):
        await _put_away(context, await _already(context))


async def release(context: Context) -> None:
    await _put_away(context, context.output("halt", How))


async def _put_away(context: Context, how: How) -> None:
    status = await context.env.records.statuses.get(context.vm_id)
    if status is None or status.value.observed.state not in LIVE:
        return
    await take_down(context.env, context.vm_id, clean=how.clean)
    words = {
        "guest": f"the guest shut down after {format_duration(how.after_s)}",
        "forced": "forced" if how.after_s < 1 else f"forced after {format_duration(how.after_s)}",
        "already": "its process was gone",
    }
    await stopped(context.env, context.vm_id, VmState.STOPPED, words[how.how])


STOP: tuple[Step, ...] = (
    Step("stop-begin", begin, undo_begin, words="preparing to stop it"),
    # The guest's own time-out may be a day; whatever else the step waits for has a deadline of its own.
    Step("halt", halt, undo_halt, timeout_s=86400.0 + 3 * MARGIN_S, words="stopping the machine"),
    Step("release", release, cancellable=False, follows=True, words="letting go of its memory and network"),
)
