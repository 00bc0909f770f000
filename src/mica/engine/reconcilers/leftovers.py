"""What lies on the host for VMs that do not exist is removed: processes first, then what they used, volumes last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mica.engine.definition import Env
from mica.model.errors import MicaError


async def reconcile(env: Env) -> str:
    # What exists on the host is listed before the rows are read: a VM created in between has a row and is left alone.
    slices = env.slices.present()
    found = {*slices, *await env.hypervisor.leftovers(set()), *await env.networks.owners(), *await env.volumes.owners()}
    known = set(await env.records.vms.scan())
    busy = {
        o.value.target.partition("/")[2]
        for o in (await env.records.operations.scan()).values()
        if not o.value.state.ended
    }
    removed, refused = [], []
    for vm_id in sorted(found - known - busy):
        try:
            await _remove(env, vm_id, slices.get(vm_id))
            removed.append(vm_id[:8])
        except MicaError as error:  # one that resists does not keep the others
            refused.append(f"{vm_id[:8]}: {error.message}")
    said = f"removed leftovers of {', '.join(removed)}" if removed else ""
    return "; ".join([said, *(f"not removed: {r}" for r in refused)]).strip("; ")


async def _remove(env: Env, vm_id: str, slice_: Mapping[str, Any] | None) -> None:
    await env.guests.erase(vm_id)
    await env.hypervisor.erase(vm_id)
    await env.networks.remove(vm_id)
    if slice_ is not None:
        await env.slices.remove(dict(slice_))
    await env.volumes.remove(vm_id)
