"""Recent use of the running VMs is sampled into memory, and what they are promised follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mica.engine.definition import Env
from mica.engine.promises import follow
from mica.model.vm import VmStatus

if TYPE_CHECKING:
    from mica.engine.engine import Engine


async def reconcile(env: Env, engine: Engine) -> str:
    running: dict[str, tuple[str, VmStatus]] = {}
    for vm_id in engine.live():
        vm, status = await env.records.vms.get(vm_id), await env.records.statuses.get(vm_id)
        if vm is not None and status is not None:
            running[vm_id] = (vm.value.name, status.value)
    await engine.sampler.sample(running)
    await follow(env)
    return ""
