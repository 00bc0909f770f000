"""What ``vm.create`` does about images that were booted once: VMs that begin there, and the hidden one that boots."""

from __future__ import annotations

import msgspec

from mica.engine import boots
from mica.engine.definition import Proposal
from mica.engine.operations.placing import free_slot
from mica.model.image import Image
from mica.model.mac import mac_address
from mica.model.views import VmCreate
from mica.model.vm import Power, Vm

replace = msgspec.structs.replace


async def hidden_vm(proposal: Proposal, body: boots.Hidden) -> Vm:
    """The VM that boots for nobody. Raises ``state-conflict`` when that is not wished for any more."""
    env, vm_id = proposal.env, proposal.target_id
    key = boots.key(body.shape)
    row = boots.check_still_wished(await env.records.boots.get(key))
    proposal.draft.put(env.records.boots, key, replace(row.value, vm_id=vm_id, why=""), row.generation)
    name = boots.vm_name(row.value.image_name)
    nics = tuple(replace(nic, mac=mac_address(vm_id, nic.name)) for nic in body.shape.nics)
    # One processor stays for everybody else, where there is more than one.
    limit = max(1.0, env.host.capacity().cpus - 1.0)
    return Vm(
        id=vm_id,
        name=name,
        spec=replace(body.shape, nics=nics, hostname=name, cpu_limit=limit),
        slot=await free_slot(env),
        created_at=env.clock.now(),
        created_by=proposal.by.name,
        intent=Power.RUNNING,
        image_name=row.value.image_name,
        hidden=True,
    )


async def begin_booted(proposal: Proposal, body: VmCreate, vm: Vm, image: Image | None) -> None:
    """Have a VM that is to start begin where its image had booted; where there is no such state, wish for one."""
    env, draft = proposal.env, proposal.draft
    if not env.policy.boot_space or not body.start or body.cold or image is None or not image.agent:
        return
    row = await boots.find(env, vm.spec)
    if row is None:
        await boots.wish(env, draft, vm.spec, image.name)
        return
    # Written anew too so that deleting the state, which expects the row as it saw it, cannot cross this.
    draft.put(env.records.snapshots, row.value.id, replace(row.value, used_at=env.clock.now()), row.generation)
    proposal.stored_params = {**proposal.stored_params, "snapshot": row.value.id, "origin": row.value.id}
