"""What ``vm.create`` does about VMs that stand by: the hidden one that is held, and the one that somebody takes."""

from __future__ import annotations

import msgspec

from mica.engine import standbys
from mica.engine.definition import Proposal
from mica.engine.operations.copying import copy_of
from mica.engine.standbys import Held, Ready
from mica.model.errors import Code, MicaError
from mica.model.snapshot import SnapshotKind
from mica.model.standby import Standby
from mica.model.views import VmCreate
from mica.model.vm import Power, Vm
from mica.ports.store import ABSENT

replace = msgspec.structs.replace


async def held_vm(proposal: Proposal, body: Held) -> Vm:
    """The VM that is to stand by. Raises ``state-conflict`` when no more are wanted."""
    env, vm_id = proposal.env, proposal.target_id
    row = await env.records.snapshots.get(body.snapshot)
    if row is None or len(await standbys.members(env, body.snapshot)) >= row.value.standby:
        raise MicaError(Code.STATE_CONFLICT, "no more VMs are to stand by")
    vm = await copy_of(proposal, body)
    proposal.stored_params = {**proposal.stored_params, "held": True}
    proposal.draft.put(env.records.standbys, vm_id, Standby(row.value.id, env.clock.now()), ABSENT)
    name = f"standby-of-{row.value.name}"[:63].rstrip("-")
    return replace(vm, name=name, spec=replace(vm.spec, hostname=name), intent=Power.PAUSED, hidden=True)


async def take(proposal: Proposal, body: VmCreate) -> bool:
    """Have the VM that ``body`` asks for be one that stands by, if one of just that shape does.

    Its rows are written as they were seen, so that of two requests only one gets it, and nobody ends it meanwhile.
    """
    env, own_id = proposal.env, proposal.target_id
    row = await env.records.snapshots.get(body.snapshot)
    if row is None or row.value.kind is not SnapshotKind.TEMPLATE or not body.start or body.full:
        return False
    for one in await standbys.ready(env, row.value.id):
        proposal.target_id = one.vm.value.id
        vm = await copy_of(proposal, body)
        if standbys.same_machine(one.vm.value.spec, vm.spec):
            _write(proposal, one, replace(vm, slot=one.vm.value.slot, layers=one.vm.value.layers))
            return True
    proposal.target_id = own_id
    return False


def _write(proposal: Proposal, one: Ready, vm: Vm) -> None:
    env, draft, status = proposal.env, proposal.draft, one.status.value
    assert status.runtime is not None
    proposal.target_name = vm.name
    spec = msgspec.to_builtins(vm.spec)
    proposal.stored_params = {**proposal.stored_params, "spec": spec, "taken": True}
    draft.delete(env.records.standbys, vm.id, one.member.generation)
    draft.put(env.records.vms, vm.id, vm, one.vm.generation)
    # It is as old as its name, for whoever looks at it.
    seen = replace(status.observed, started_at=env.clock.now(), reason="")
    mine = replace(status, runtime=replace(status.runtime, spec=vm.spec), observed=seen)
    draft.put(env.records.statuses, vm.id, mine, one.status.generation)
