"""After a boot of the host, VMs with ``autostart`` are started; after a mere restart of the daemon nothing is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mica.engine.definition import Env
from mica.engine.records import Draft, Mark
from mica.model.errors import MicaError
from mica.model.operation import Actor
from mica.model.views import VmStart
from mica.model.vm import VmState, VmStatus
from mica.ports.store import ABSENT

if TYPE_CHECKING:
    from mica.engine.engine import Engine

BY = Actor("mica", "reconciler:autostart")
DOWN = (VmState.STOPPED, VmState.CRASHED, VmState.SUSPENDED)


def _from_before(status: VmStatus, boot_id: str) -> bool:
    """It is shown with a process that cannot have survived the host's boot."""
    return status.runtime is not None and status.runtime.process.boot_id != boot_id


async def reconcile(env: Env, engine: Engine) -> str:
    boot_id = env.host.boot_id()
    mark = await env.records.marks.get("host")
    if mark is not None and mark.value.boot_id == boot_id:
        return ""
    wanted = {i: vm for i, vm in (await env.records.vms.scan()).items() if vm.value.spec.autostart}
    statuses = await env.records.statuses.scan()
    if any(_from_before(statuses[i].value, boot_id) for i in wanted if i in statuses):
        return ""  # their actors have not seen yet that the host went down under them: the next round is soon
    refused, started = [], 0
    for vm_id, vm in wanted.items():
        status = statuses.get(vm_id)
        down = status is not None and status.value.observed.state in DOWN
        if not down or vm.value.deleted_at is not None or engine.waiting(vm_id):
            continue
        try:
            # One key for one boot: a daemon that dies in the middle of this does not start anything twice.
            await engine.submit("vm.start", vm_id, VmStart(), by=BY, idempotency_key=f"{boot_id}:{vm_id}")
            started += 1
        except MicaError as error:
            refused.append(f"{vm.value.name}: {error.message}")
    draft = Draft()
    draft.put(env.records.marks, "host", Mark(boot_id), mark.generation if mark else ABSENT)
    await env.records.commit(draft)
    said = f"started {started} VMs after the host's boot" if started else ""
    return "; ".join([said, *(f"not started: {r}" for r in refused)]).strip("; ")
