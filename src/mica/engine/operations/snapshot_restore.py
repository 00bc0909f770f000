"""``snapshot.restore``: a VM is again what it was at a moment, memory and all.

The machine that runs is ended first, as by a power cut: whoever asks for this has a snapshot of the present state, or
said that it is not wanted. Damage is looked for before that, in everything that a guest would run on at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mica.engine.admission import Ways
from mica.engine.definition import Context, Definition, Proposal, Step
from mica.engine.operations.keeping import layered_disks
from mica.engine.operations.reserving import PROMISE, image_of, reserve
from mica.engine.operations.starting import START
from mica.engine.records import Draft
from mica.engine.settle import moved, set_state, stopped, take_down
from mica.engine.snapshots import check_parts, need_whole
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.snapshot import SnapshotState
from mica.model.transitions import LIVE, VmVerb
from mica.model.vm import Power, VmSpec, VmState, as_of

replace = msgspec.structs.replace


class Revert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``snapshot`` is an id. ``needs`` is the snapshot of the present state that must be complete before anything is
    given up; empty when there need be none."""

    snapshot: str
    needs: str = ""
    memory: bool = True
    overcommit: bool = False


async def plan(proposal: Proposal) -> None:
    assert isinstance(proposal.params, Revert)
    assert proposal.vm is not None
    env, body, vm = proposal.env, proposal.params, proposal.vm.value
    row = await env.records.snapshots.need(body.snapshot)
    snapshot = row.value
    if snapshot.state is not SnapshotState.COMPLETE:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"snapshot {snapshot.name} of {vm.name} is not complete yet",
            hint="wait for it: `mica operation list`",
            retryable=True,
        )
    await need_whole(env, snapshot)
    proposal.draft.put(env.records.snapshots, snapshot.id, snapshot, row.generation)
    memory = body.memory and snapshot.memory is not None
    back = replace(vm, spec=as_of(snapshot.spec, vm.spec), intent=Power.RUNNING if memory else Power.STOPPED)
    if memory:
        ways, image = Ways(change=None), await image_of(env, snapshot)
        await reserve(proposal, back, overcommit=body.overcommit, image=image, ways=ways)
    proposal.stored_params = {
        **proposal.stored_params,
        "spec": msgspec.to_builtins(back.spec),
        "start": memory,
        "origin": snapshot.id if memory else "",
    }


def _params(context: Context) -> Revert:
    given = {key: value for key, value in context.operation.params.items() if key in Revert.__struct_fields__}
    return msgspec.convert(given, Revert)


async def check(context: Context) -> None:
    """Everything that the guest would run on at once is as it was written, and the present state is kept."""
    env, params = context.env, _params(context)
    if params.needs:
        kept = await env.records.snapshots.get(params.needs)
        if kept is None or kept.value.state is not SnapshotState.COMPLETE:
            raise MicaError(
                Code.STATE_CONFLICT,
                "the present state could not be kept as a snapshot, so it is not given up",
                hint="`mica operation list` says why; `--no-keep` gives it up",
            )
    snapshot = (await env.records.snapshots.need(params.snapshot)).value
    await check_parts(env, snapshot, memory=params.memory)


async def down(context: Context) -> None:
    """End the machine at once."""
    env, vm_id = context.env, context.vm_id
    status = (await env.records.statuses.need(vm_id)).value
    if status.observed.state in LIVE:
        if status.observed.state is not VmState.STOPPING:
            await set_state(env, vm_id, lambda o: moved(env, o, VmState.STOPPING))
        await take_down(env, vm_id, clean=False)
        await stopped(env, vm_id, VmState.STOPPED, "ended to go back to a snapshot", but=context.operation.id)
    elif status.observed.state is VmState.CRASHED:
        await stopped(env, vm_id, VmState.STOPPED, "given up to go back to a snapshot", but=context.operation.id)


async def volumes(context: Context) -> None:
    """Fresh layers over the snapshot's in the place of the present ones; the row first, for the reaper."""
    env, vm_id = context.env, context.vm_id
    snapshot = (await env.records.snapshots.need(context.operation.params["snapshot"])).value
    spec = msgspec.convert(context.operation.params["spec"], VmSpec)
    owner = env.policy.owner((await env.records.vms.need(vm_id)).value.slot)

    async def write(draft: Draft) -> None:
        vm = await env.records.vms.need(vm_id)
        both = replace(vm.value, layers={**vm.value.layers, **snapshot.disks}, spec=spec, snapshot=snapshot.id)
        both = replace(both, intent=Power.RUNNING if context.operation.params["start"] else Power.STOPPED)
        if both != vm.value:
            draft.put(env.records.vms, vm_id, both, vm.generation)

    for disk in layered_disks(snapshot.spec):
        if disk.name in snapshot.disks:
            context.report(None, f"making disk {disk.name}")
            await env.branches.stage(vm_id, disk, env.parts.path(snapshot.disks[disk.name]), owner)
    await env.records.transact(write)
    await env.records.statuses.update(vm_id, lambda s: replace(s, checking=snapshot.id))
    await env.branches.take(vm_id)
    await env.volumes.settled(vm_id)


async def undo_volumes(context: Context) -> None:
    """What is staged and not taken goes. What is taken stays: the VM is at the snapshot, and stopped."""
    await context.env.branches.unstage(context.vm_id)


def steps(operation: Operation) -> Sequence[Step]:
    return (PROMISE, *BACK, *(START if operation.params.get("start") else ()))


BACK = (
    Step("check", check, timeout_s=3600.0, words="looking for damage"),
    Step("down", down, cancellable=False, words="ending the machine"),
    Step("volumes", volumes, undo_volumes, cancellable=False, follows=True, words="putting its disks back"),
)

DEFINITION = Definition(
    verb=VmVerb.REVERT,
    noun="vm",
    params=Revert,
    plan=plan,
    steps=steps,
    state_verb=VmVerb.REVERT,
    anchored=True,
)
