"""``vm.start``: from nothing to running vCPUs."""

from __future__ import annotations

import msgspec

from mica.engine.definition import Definition, Proposal
from mica.engine.operations.salvaging import SALVAGE, reserve_most, result
from mica.engine.operations.starting import PROMISE, START, reserve
from mica.model.transitions import VmVerb
from mica.model.views import VmStart
from mica.model.vm import Power


async def plan(proposal: Proposal) -> None:
    assert proposal.vm is not None
    assert isinstance(proposal.params, VmStart)
    vm = proposal.vm.value
    if proposal.params.last_valid:
        await reserve_most(proposal, vm, overcommit=proposal.params.overcommit)
    else:
        await reserve(proposal, vm, overcommit=proposal.params.overcommit)
    intent = Power.PAUSED if proposal.params.paused else Power.RUNNING
    wanted = msgspec.structs.replace(vm, intent=intent)
    proposal.draft.put(proposal.env.records.vms, vm.id, wanted, proposal.vm.generation)


DEFINITION = Definition(
    verb=VmVerb.START,
    noun="vm",
    params=VmStart,
    plan=plan,
    steps=lambda o: (PROMISE, *(SALVAGE if o.params.get("last_valid") else ()), *START),
    state_verb=VmVerb.START,
    result=result,
    anchored=True,
)
