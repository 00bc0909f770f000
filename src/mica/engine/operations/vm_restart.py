"""``vm.restart``: down as ``vm.stop`` does it, then up with the spec as it is now. The memory stays reserved."""

from __future__ import annotations

import msgspec

from mica.engine.admission import Ways
from mica.engine.damage import unmarked
from mica.engine.definition import Definition, Proposal
from mica.engine.operations.reserving import PROMISE, reserve
from mica.engine.operations.starting import START
from mica.engine.operations.stopping import STOP
from mica.engine.operations.vm_stop import result
from mica.model.transitions import VmVerb
from mica.model.views import VmStop
from mica.model.vm import Power


async def plan(proposal: Proposal) -> None:
    assert proposal.vm is not None
    vm = proposal.vm.value
    await unmarked(proposal.env, vm)  # before it is stopped
    insist = f"`mica vm stop {vm.name}` and `mica vm start --overcommit {vm.name}` insist"
    await reserve(proposal, vm, overcommit=False, ways=Ways(f"mica vm set {vm.name} ", insist))
    wanted = msgspec.structs.replace(vm, intent=Power.RUNNING)
    proposal.draft.put(proposal.env.records.vms, vm.id, wanted, proposal.vm.generation)


# Once the guest is down there is nothing to go back to: a restart that fails later leaves a stopped VM.
STEPS = (PROMISE, *STOP, *START)

DEFINITION = Definition(
    verb=VmVerb.RESTART,
    noun="vm",
    params=VmStop,
    plan=plan,
    steps=lambda _: STEPS,
    state_verb=VmVerb.RESTART,
    result=result,
    anchored=True,
)
