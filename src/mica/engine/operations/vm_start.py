"""``vm.start``: from nothing to running vCPUs, or from where a suspended VM was."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mica.engine.admission import Ways
from mica.engine.definition import Definition, Proposal, Step
from mica.engine.operations.reserving import PROMISE, image_of, reserve
from mica.engine.operations.salvaging import SALVAGE, reserve_most, result
from mica.engine.operations.starting import START
from mica.engine.operations.waking import WAKE
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.transitions import VmVerb
from mica.model.views import VmStart
from mica.model.vm import Power, Vm, VmState

replace = msgspec.structs.replace


async def plan(proposal: Proposal) -> None:
    assert proposal.vm is not None
    assert isinstance(proposal.params, VmStart)
    body, vm = proposal.params, proposal.vm.value
    wakes = proposal.expected is VmState.SUSPENDED
    if body.last_valid and wakes:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"VM {vm.name} is suspended, and its memory belongs to its disks as they are",
            hint=f"give its memory up first: `mica vm stop --discard {vm.name}`",
        )
    last_valid = body.last_valid or (vm.spec.last_valid and not wakes)
    if last_valid:
        await reserve_most(proposal, vm, overcommit=body.overcommit)
    else:
        # What lies on disk of a suspended VM is of one size.
        ways, image = (Ways(change=None), await _image(proposal)) if wakes else (None, "")
        starts = _suspended(proposal, vm) if wakes else vm
        await reserve(proposal, starts, overcommit=body.overcommit, image=image, ways=ways)
    proposal.stored_params = {**proposal.stored_params, "wake": wakes, "last_valid": last_valid}
    wanted = replace(vm, intent=Power.PAUSED if body.paused else Power.RUNNING)
    proposal.draft.put(proposal.env.records.vms, vm.id, wanted, proposal.vm.generation)


def _suspended(proposal: Proposal, vm: Vm) -> Vm:
    """The VM with what its machine is made of that is suspended or about to be, whatever was set for its next one."""
    assert proposal.status is not None
    status = proposal.status.value
    machine = status.suspended or status.runtime
    return vm if machine is None else replace(vm, spec=machine.spec)


async def _image(proposal: Proposal) -> str:
    """The RAM image that the memory of the suspended VM is in; empty when it is only about to be suspended."""
    assert proposal.status is not None
    saved = proposal.status.value.suspended
    row = await proposal.env.records.snapshots.get(saved.snapshot) if saved is not None else None
    return await image_of(proposal.env, row.value) if row is not None else ""


def steps(operation: Operation) -> Sequence[Step]:
    if operation.params.get("wake"):
        return (PROMISE, *WAKE)
    return (PROMISE, *(SALVAGE if operation.params.get("last_valid") else ()), *START)


DEFINITION = Definition(
    verb=VmVerb.START,
    noun="vm",
    params=VmStart,
    plan=plan,
    steps=steps,
    state_verb=VmVerb.START,
    result=result,
    anchored=True,
)
