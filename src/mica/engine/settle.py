"""What is written about a VM's observed state, and what is taken down when its process has ended."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mica.engine.definition import Env
from mica.engine.records import Draft
from mica.model.errors import Code, Problem
from mica.model.transitions import FOLLOWS
from mica.model.vm import AgentState, Suspended, VmObserved, VmState, VmStatus
from mica.ports.hypervisor import Exit

replace = msgspec.structs.replace

# Why a VM is where it is of which something may be left or missing.
NOT_FULLY = "not fully"
NOT_DELETED = f"{NOT_FULLY} deleted"


async def set_state(env: Env, vm_id: str, change: Callable[[VmObserved], VmObserved]) -> VmStatus:
    """Write what is seen. A step that the table of transitions does not know is a fault and is refused."""

    def checked(status: VmStatus) -> VmStatus:
        new = change(status.observed)
        old = status.observed.state
        if new.state is not old and new.state not in FOLLOWS[old]:
            raise AssertionError(f"VM {vm_id}: {new.state} cannot follow {old}")
        return replace(status, observed=new)

    return (await env.records.statuses.update(vm_id, checked)).value


def moved(
    env: Env, observed: VmObserved, state: VmState, reason: str = "", problem: Problem | None = None
) -> VmObserved:
    """``observed`` in another state, since now."""
    since = observed.since if observed.state is state else env.clock.now()
    return replace(observed, state=state, since=since, reason=reason, problem=problem)


async def take_down(env: Env, vm_id: str, *, clean: bool) -> None:
    """Remove everything that a started VM holds on the host but its disks. Idempotent; the process may still live."""
    row = await env.records.statuses.get(vm_id)
    runtime = row.value.runtime if row else None
    env.machines.detach(vm_id)
    await env.guests.forget(vm_id)
    await env.hypervisor.cleanup(vm_id, runtime)
    if runtime is not None:
        for nic in runtime.nics:
            await env.networks.detach(vm_id, nic)
        if runtime.slice:
            await env.slices.remove(runtime.slice)
    if clean:
        await env.volumes.settled(vm_id)


async def stopped(
    env: Env,
    vm_id: str,
    state: VmState,
    reason: str,
    problem: Problem | None = None,
    *,
    but: str = "",
    suspended: Suspended | None = None,
) -> None:
    """Record that the VM has no process any more, and give back what it was promised, in one transaction.

    Not when an accepted operation, other than ``but``, will bring it up again: that was admitted with this memory.
    A VM whose memory is on disk, now (``suspended``) or still, is suspended, whatever ``state`` says.
    """
    keep = env.machines.wanted(vm_id, but=but)

    async def write(draft: Draft) -> None:
        status = await env.records.statuses.need(vm_id)
        saved = suspended or status.value.suspended
        seen = moved(env, status.value.observed, VmState.SUSPENDED if saved else state, reason, problem)
        seen = replace(seen, agent=AgentState.ABSENT, started_at=None, addresses=())
        down = replace(status.value, runtime=None, observed=seen, suspended=saved)
        if saved is None:  # with its memory who it was is gone: it will boot as itself
            # ... unless nobody has told its guest yet who it is.
            becoming = status.value.becoming if not status.value.identity else None
            down = replace(down, identity=(), becoming=becoming, frozen="")
        if down != status.value:
            draft.put(env.records.statuses, vm_id, down, status.generation)
        if not keep:
            await env.records.draft_promise(draft, vm_id, None)

    await env.records.transact(write)


async def never_ran(env: Env, vm_id: str) -> None:
    """The VM is on its way up or down, nothing is left that would go on, and there is no process known of it."""
    await take_down(env, vm_id, clean=False)
    await stopped(env, vm_id, VmState.STOPPED, "it was not fully started")


async def settle(env: Env, vm_id: str, gone: Exit, *, watched: bool) -> None:
    """The VM's process ended and no operation did it: say why, and take the rest down."""
    await take_down(env, vm_id, clean=gone.clean)
    if gone.clean:
        reason = "the guest powered off" if watched else "the guest powered off while no daemon was watching"
        await stopped(env, vm_id, VmState.STOPPED, reason)
        return
    words = f": {gone.last_words}" if gone.last_words else ""
    problem = Problem(
        Code.QEMU_FAILED,
        f"its QEMU process ended unexpectedly{words}",
        hint=f"`mica vm log {vm_id[:8]} --qemu` has its messages; `mica vm start` starts it again",
    )
    when = "" if watched else " while no daemon was watching"
    await stopped(env, vm_id, VmState.CRASHED, f"its QEMU process ended unexpectedly{when}", problem)
