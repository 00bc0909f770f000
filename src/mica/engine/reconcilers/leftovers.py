"""What lies on the host for VMs that do not exist is removed: processes first, then volumes."""

from __future__ import annotations

from mica.engine.definition import Env


async def reconcile(env: Env) -> str:
    # What exists on the host is listed before the rows are read: a VM created in between has a row and is left alone.
    owners = await env.volumes.owners()
    running = await env.hypervisor.leftovers(set())
    known = set(await env.records.vms.scan())
    busy = {
        o.value.target.partition("/")[2]
        for o in (await env.records.operations.scan()).values()
        if not o.value.state.ended
    }
    removed = []
    for vm_id in sorted({*running, *owners} - known - busy):
        await env.guests.erase(vm_id)
        await env.hypervisor.erase(vm_id)
        await env.volumes.remove(vm_id)
        removed.append(vm_id[:8])
    return f"removed leftovers of {', '.join(removed)}" if removed else ""
