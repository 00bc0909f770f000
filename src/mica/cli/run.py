"""``mica run``."""

from __future__ import annotations

import asyncio
from typing import Annotated

from mica.cli.context import Context
from mica.cli.guest import NO_GUEST_OPTIONS, GuestOptions, run_in_guest
from mica.cli.interrupts import absorb_cancellation
from mica.cli.options import DEFAULTS, Duration, Flag, Hidden, ImageOrTemplateArg, Options
from mica.cli.progress import Progress
from mica.cli.shape import NO_SHAPE, Shape
from mica.cli.vm_show import address, publish_text
from mica.client import Client
from mica.client.handle import VmHandle
from mica.client.vms import AGENT_TIMEOUT_S, make_create, vm_id
from mica.model.operation import Operation
from mica.model.vm import AgentState

_REMOVE_TIMEOUT_S = 120.0


async def run(
    image: ImageOrTemplateArg,
    /,
    *command: str,
    rm: Flag = False,
    cold: Flag = False,
    agent_timeout: Duration = AGENT_TIMEOUT_S,
    shape: Shape = NO_SHAPE,
    how: GuestOptions = NO_GUEST_OPTIONS,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Create a VM, start it, wait for its guest agent, and run a command in it: mica run IMAGE -- COMMAND…

    From a template (mica template) it begins as a running copy of that, in a moment. The images micro and debian are
    built on first use. With a command, its exit status becomes ours. Ctrl-C before the
    VM runs cancels and leaves nothing behind.

    Parameters
    ----------
    image
        Name or digest of an image, or name of a template: see mica image list, mica template list.
    command
        The command for the guest, after --. Without one the VM is left running.
    rm
        Delete the VM for good when the command has ended; without a command, when the guest shuts down.
    cold
        Boot it, also where this image was booted once already and the VM could begin there.
    agent_timeout
        How long to wait for the guest agent, for example 10m.
    """
    async with ctx.client() as client:

        async def wait(operation: Operation) -> Operation:
            return await ctx.wait(client, operation, cancel=True)

        agent = await client.ensure(image, waiter=wait)
        body = make_create(image, start=True, ephemeral=rm, cold=cold, **shape.fields())
        operation = await ctx.perform(client, client.vms.create(body, wait=False), cancel=True)
        vm = await client.vms.get(vm_id(operation))
        vm.rm = rm and bool(command)
        if not vm.rm:
            return await _use(ctx, vm, command, how, agent=agent, agent_timeout_s=agent_timeout)
        try:
            return await _use(ctx, vm, command, how, agent=agent, agent_timeout_s=agent_timeout)
        finally:
            await _remove(ctx, client, vm)


async def _use(
    ctx: Context,
    vm: VmHandle,
    command: tuple[str, ...],
    how: GuestOptions,
    *,
    agent: bool,
    agent_timeout_s: float,
) -> int:
    if (agent or command) and vm.view.observed.agent is not AgentState.READY:
        await _wait_agent(ctx, vm, agent_timeout_s)
    if command:
        return await run_in_guest(ctx, vm, command, how)
    ctx.emit(vm.view, lambda: _outcome(vm))
    return 0


async def _wait_agent(ctx: Context, vm: VmHandle, timeout_s: float) -> None:
    with Progress(ctx.world, quiet=ctx.json) as progress:
        waiting = asyncio.ensure_future(vm.wait_agent(timeout_s=timeout_s))
        try:
            while not waiting.done():
                progress.show(f"run {vm.name}", None, "waiting for the guest agent")
                await asyncio.wait([waiting], timeout=0.25)
            waiting.result()
        except asyncio.CancelledError:
            progress.close()
            if not vm.rm:
                ctx.say(f"{vm.name} goes on starting; look at it with: mica vm console {vm.name}")
            raise
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def _outcome(vm: VmHandle) -> str:
    lines = [f"{vm.name} is {vm.state}"]
    where = address(vm.view)
    if where != "-":
        lines[0] += f" at {where}"
    lines += [f"  {publish_text(publish)}" for nic in vm.view.nics for publish in nic.publish]
    if vm.view.observed.agent is AgentState.READY:
        lines.append(f"try: mica vm exec {vm.name} -- uname -a")
    else:
        lines.append(f"try: mica vm console {vm.name}")
    return "\n".join(lines)


async def _remove(ctx: Context, client: Client, vm: VmHandle) -> None:
    """Also after Ctrl-C; another Ctrl-C leaves it to the daemon."""
    if ctx.interrupts.last is not None:
        ctx.say(f"deleting {vm.name}")
        absorb_cancellation()
    try:
        async with asyncio.timeout(_REMOVE_TIMEOUT_S):
            await vm.remove()
    except asyncio.CancelledError:
        ctx.say(f"deleting {vm.name} goes on")
        raise
