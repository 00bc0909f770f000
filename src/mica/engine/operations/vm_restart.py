"""``vm.restart``: down as ``vm.stop`` does it, then up with the spec as it is now. The memory stays reserved."""

from __future__ import annotations

import msgspec

from mica.engine.definition import Context, Definition, Proposal, Step
from mica.engine.operations.starting import START, reserve
from mica.engine.operations.stopping import STOP
from mica.engine.operations.vm_stop import result
from mica.engine.records import MAX_ATTEMPTS, Draft, Ledger, Reservation, contended
from mica.model.transitions import VmVerb
from mica.model.views import VmStop
from mica.model.vm import Power
from mica.ports.store import Conflict


async def plan(proposal: Proposal) -> None:
    assert proposal.vm is not None
    vm = proposal.vm.value
    await reserve(proposal, vm, overcommit=False)
    wanted = msgspec.structs.replace(vm, intent=Power.RUNNING)
    proposal.draft.put(proposal.env.records.vms, vm.id, wanted, proposal.vm.generation)


async def keep_reservation(context: Context) -> None:
    """The stop gave the promise back; take it again at once. It was admitted when the restart was accepted."""
    records = context.env.records
    vm = (await records.vms.need(context.vm_id)).value
    need = Reservation(vm.spec.memory, context.env.hypervisor.overhead(vm.spec))
    for _ in range(MAX_ATTEMPTS):
        ledger = await records.read_ledger()
        if ledger.value.reserved.get(vm.id) == need:
            return
        draft = Draft()
        draft.put(records.ledger, "memory", Ledger({**ledger.value.reserved, vm.id: need}), ledger.generation)
        try:
            await records.commit(draft)
        except Conflict:
            continue
        return
    raise contended("ledger", "memory")


async def release_reservation(context: Context) -> None:
    await context.env.records.release(context.vm_id)


# Once the guest is down there is nothing to go back to: a restart that fails later leaves a stopped VM.
STEPS = (*STOP, Step("reserve", keep_reservation, release_reservation), *START)

DEFINITION = Definition(
    verb=VmVerb.RESTART,
    noun="vm",
    params=VmStop,
    plan=plan,
    steps=lambda _: STEPS,
    state_verb=VmVerb.RESTART,
    result=result,
)
