"""Memory is promised to the VMs that run or are about to, as much as they have or may come to, and to nobody else."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.promises import due
from mica.engine.records import Draft, Ledger, Reservation
from mica.model.transitions import LIVE
from mica.ports.store import Conflict


async def reconcile(env: Env) -> str:
    # The ledger is read first and written only if it is still the same: a start that is accepted meanwhile changes it.
    ledger = await env.records.read_ledger()
    busy = {
        o.value.target.partition("/")[2]
        for o in (await env.records.operations.scan()).values()
        if not o.value.state.ended
    }
    right: dict[str, Reservation] = {vm_id: r for vm_id, r in ledger.value.reserved.items() if vm_id in busy}
    for vm_id, status in (await env.records.statuses.scan()).items():
        runtime = status.value.runtime
        if vm_id not in busy and status.value.observed.state in LIVE and runtime is not None:
            right[vm_id] = due(env, vm_id, runtime, ledger.value.reserved.get(vm_id))
    wrong = {
        vm_id for vm_id in {*right, *ledger.value.reserved} if right.get(vm_id) != ledger.value.reserved.get(vm_id)
    }
    if not wrong:
        return ""
    draft = Draft()
    draft.put(env.records.ledger, "memory", Ledger(right), ledger.generation)
    try:
        await env.records.commit(draft)
    except Conflict:
        return ""  # somebody was quicker; the next round looks again
    return f"corrected the memory of {', '.join(sorted(vm_id[:8] for vm_id in wrong))}"
