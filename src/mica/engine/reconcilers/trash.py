"""VMs whose time in the trash is over are purged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mica.engine.definition import Env
from mica.model.operation import Actor
from mica.model.views import VmDelete

if TYPE_CHECKING:
    from mica.engine.engine import Engine

BY = Actor("mica", "reconciler:trash")


async def reconcile(env: Env, engine: Engine) -> str:
    now = env.clock.now()
    purged = []
    for vm_id, vm in (await env.records.vms.scan()).items():
        if vm.value.expires_at is not None and vm.value.expires_at <= now and not engine.waiting(vm_id):
            await engine.submit("vm.purge", vm_id, VmDelete(purge=True), by=BY)
            purged.append(vm.value.name)
    return f"purged {', '.join(purged)}" if purged else ""
