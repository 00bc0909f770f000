"""VMs whose time is over are purged: those whose time in the trash is, and ephemeral ones that have done their work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mica.engine.definition import Env
from mica.model.errors import MicaError
from mica.model.operation import Actor
from mica.model.views import VmDelete
from mica.model.vm import Power, Vm, VmObserved, VmState

if TYPE_CHECKING:
    from mica.engine.engine import Engine

BY = Actor("mica", "reconciler:trash")

# What an ephemeral VM comes to in the end; deleting it may have failed half way.
_ENDED = frozenset({VmState.CRASHED, VmState.DELETING})


async def reconcile(env: Env, engine: Engine) -> str:
    now = env.clock.now()
    statuses = await env.records.statuses.scan()
    purged, refused = [], []
    for vm_id, vm in (await env.records.vms.scan()).items():
        expired = vm.value.expires_at is not None and vm.value.expires_at <= now
        done = vm_id in statuses and has_done_its_work(vm.value, statuses[vm_id].value.observed)
        if not (expired or done) or engine.waiting(vm_id):
            continue
        try:
            await engine.submit("vm.purge", vm_id, VmDelete(purge=True), by=BY)
            purged.append(vm.value.name)
        except MicaError as error:
            refused.append(f"{vm.value.name}: {error.message}")
    said = f"purged {', '.join(purged)}" if purged else ""
    return "; ".join([said, *(f"not purged: {r}" for r in refused)]).strip("; ")


def has_done_its_work(vm: Vm, seen: VmObserved) -> bool:
    """An ephemeral VM that was to run and has ended by itself. One that failed to start is kept."""
    ended = seen.state in _ENDED or (seen.state is VmState.STOPPED and seen.problem is None)
    return vm.spec.ephemeral and vm.intent is not Power.STOPPED and ended
