"""What is written about a VM's observed state, and what is taken down when its process has ended."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mica.engine.definition import Env
from mica.model.errors import Code, Problem
from mica.model.transitions import FOLLOWS
from mica.model.vm import AgentState, VmObserved, VmState, VmStatus
from mica.ports.hypervisor import Exit

replace = msgspec.structs.replace


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


async def stopped(env: Env, vm_id: str, state: VmState, reason: str, problem: Problem | None = None) -> None:
    """Record that the VM has no process any more, and give back what it was promised."""
    await env.records.statuses.update(
        vm_id,
        lambda s: replace(
            s,
            runtime=None,
            observed=replace(
                moved(env, s.observed, state, reason, problem), agent=AgentState.ABSENT, started_at=None, addresses=()
            ),
        ),
    )
    await env.records.release(vm_id)


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
