"""``vm.delete`` into the trash, ``vm.restore`` out of it, ``vm.purge`` for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mica.engine.definition import Context, Definition, Proposal, Step
from mica.engine.operations.stopping import STOP
from mica.engine.operations.vm_create import claim_name, erase
from mica.engine.operations.vm_suspend import GIVE_UP
from mica.engine.records import Draft
from mica.engine.settle import NOT_DELETED, moved, set_state
from mica.engine.snapshots import sweep
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.transitions import VmVerb
from mica.model.views import VmDelete, VmRestore
from mica.model.vm import Power, Vm, VmState, check_name

replace = msgspec.structs.replace


def check_protection(vm: Vm) -> None:
    """Raises ``protected``."""
    if vm.spec.protected:
        raise MicaError(
            Code.PROTECTED,
            f"VM {vm.name} is protected from deletion",
            hint=f"`mica vm set {vm.name} --no-protected` lifts that",
        )


async def plan_delete(proposal: Proposal) -> None:
    assert proposal.vm is not None
    assert isinstance(proposal.params, VmDelete)
    vm = proposal.vm.value
    check_protection(vm)
    proposal.stored_params = {"name": vm.name}
    intent = replace(vm, intent=Power.STOPPED)
    proposal.draft.put(proposal.env.records.vms, vm.id, intent, proposal.vm.generation)


async def trash(context: Context) -> None:
    """Free the name and set the expiry in one transaction."""
    env, vm_id = context.env, context.vm_id
    now = env.clock.now()

    async def write(draft: Draft) -> None:
        vm = await env.records.vms.need(vm_id)
        if vm.value.deleted_at is not None:
            return
        gone = replace(vm.value, deleted_at=now, expires_at=now + env.policy.trash_s)
        draft.put(env.records.vms, vm_id, gone, vm.generation)
        claim = await env.records.names.get(vm.value.name)
        if claim is not None and claim.value.holder == vm_id:
            draft.delete(env.records.names, vm.value.name, claim.generation)

    await env.records.transact(write)
    await set_state(env, vm_id, lambda o: moved(env, o, VmState.TRASHED, "deleted"))


async def untrash(context: Context) -> None:
    """Out of the trash under its name, or the one it was given. The name may be gone: then the undo is stuck."""
    env, vm_id = context.env, context.vm_id

    async def write(draft: Draft) -> None:
        vm = await env.records.vms.need(vm_id)
        if vm.value.deleted_at is None:
            return
        back = replace(vm.value, deleted_at=None, expires_at=None)
        draft.put(env.records.vms, vm_id, back, vm.generation)
        claim = await env.records.names.get(vm.value.name)
        if claim is None or claim.value.holder != vm_id:
            await claim_name(env, draft, vm.value.name, vm_id)

    await env.records.transact(write)
    status = (await env.records.statuses.need(vm_id)).value
    if status.observed.state is VmState.TRASHED:
        await set_state(env, vm_id, lambda o: moved(env, o, VmState.STOPPED, "restored from the trash"))


def delete_steps(operation: Operation) -> Sequence[Step]:
    end = Step("trash", trash, untrash, cancellable=False, words="moving it to the trash")
    return (*STOP, GIVE_UP, end) if operation.params.get("force") else (end,)


async def plan_restore(proposal: Proposal) -> None:
    assert proposal.vm is not None
    assert isinstance(proposal.params, VmRestore)
    env, vm = proposal.env, proposal.vm.value
    if vm.deleted_at is None:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"VM {vm.name} is not in the trash yet",
            hint="restore it once its deletion has ended, or cancel that",
            retryable=True,
        )
    name = check_name(proposal.params.name, "VM name") if proposal.params.name else vm.name
    proposal.stored_params = {"old_name": vm.name, "deleted_at": vm.deleted_at, "expires_at": vm.expires_at}
    proposal.target_name = name
    hint = f"give it another: `mica vm restore {vm.name} --name NAME`"
    await claim_name(env, proposal.draft, name, vm.id, hint)
    proposal.draft.put(env.records.vms, vm.id, replace(vm, name=name), proposal.vm.generation)


async def record(context: Context) -> None:
    """The name was claimed when the request was accepted; this step is where taking that back is anchored."""


async def undo_restore(context: Context) -> None:
    env, vm_id, old = context.env, context.vm_id, context.operation.params

    async def write(draft: Draft) -> None:
        vm = await env.records.vms.need(vm_id)
        claim = await env.records.names.get(vm.value.name)
        if claim is not None and claim.value.holder == vm_id:
            draft.delete(env.records.names, vm.value.name, claim.generation)
        back = replace(
            vm.value,
            name=old["old_name"],
            deleted_at=old["deleted_at"],
            expires_at=old["expires_at"],
        )
        draft.put(env.records.vms, vm_id, back, vm.generation)

    if await env.records.vms.get(vm_id) is None:
        return
    await env.records.transact(write)
    await set_state(env, vm_id, lambda o: moved(env, o, VmState.TRASHED, "deleted"))


async def plan_purge(proposal: Proposal) -> None:
    await plan_delete(proposal)


async def empty(context: Context) -> None:
    """Delete what the VM has on the host. From here there is no way back, so the verb cannot be cancelled any more."""
    env, vm_id = context.env, context.vm_id
    if await env.records.statuses.get(vm_id) is not None:
        await set_state(env, vm_id, lambda o: moved(env, o, VmState.DELETING))
    await env.guests.erase(vm_id)
    await env.hypervisor.erase(vm_id)
    await env.volumes.remove(vm_id)


async def undo_empty(context: Context) -> None:
    """What is deleted stays deleted: nothing can be done with the VM any more but to purge it again."""
    env = context.env
    status = await env.records.statuses.get(context.vm_id)
    if status is not None and status.value.observed.state is VmState.DELETING:
        await set_state(env, context.vm_id, lambda o: moved(env, o, VmState.DELETING, NOT_DELETED, context.failure))


async def forget(context: Context) -> None:
    await context.env.records.release(context.vm_id)
    await erase(context.env, context.vm_id)


async def clear(context: Context) -> str:
    return await sweep(context.env)


def purge_steps(operation: Operation) -> Sequence[Step]:
    end = (
        Step("empty", empty, undo_empty, cancellable=False, words="deleting its disks"),
        Step("forget", forget, cancellable=False, follows=True, words="deleting its logs and records"),
        Step("clear", clear, cancellable=False, follows=True, timeout_s=600.0, words="freeing what nothing needs"),
    )
    return (*STOP, GIVE_UP, *end) if operation.params.get("force") else end


def result(context: Context) -> dict[str, Any]:
    return {"id": context.vm_id, "name": context.operation.params.get("name", context.operation.target_name)}


DELETE_DEFINITION = Definition(
    verb=VmVerb.DELETE,
    noun="vm",
    params=VmDelete,
    plan=plan_delete,
    steps=delete_steps,
    state_verb=VmVerb.DELETE,
    result=result,
)
RESTORE_DEFINITION = Definition(
    verb=VmVerb.RESTORE,
    noun="vm",
    params=VmRestore,
    plan=plan_restore,
    steps=lambda _: (
        Step("record", record, undo_restore, words="taking its name again"),
        Step("restore", untrash, cancellable=False, words="taking it out of the trash"),
    ),
    state_verb=VmVerb.RESTORE,
    anchored=True,
    result=result,
)
PURGE_DEFINITION = Definition(
    verb=VmVerb.PURGE,
    noun="vm",
    params=VmDelete,
    plan=plan_purge,
    steps=purge_steps,
    state_verb=VmVerb.PURGE,
    result=result,
)
