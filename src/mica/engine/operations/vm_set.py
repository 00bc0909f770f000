"""``vm.set``: change what the user wants. What a running machine can take is applied; the rest is shown as pending."""

from __future__ import annotations

from typing import Any

import msgspec

from mica.engine.definition import Context, Definition, Proposal, Step
from mica.engine.operations.starting import slice_limits
from mica.engine.operations.vm_create import claim_name, with_macs
from mica.engine.records import Draft
from mica.model.errors import Code, MicaError, invalid
from mica.model.transitions import VmVerb
from mica.model.units import format_size
from mica.model.views import VmSet
from mica.model.vm import Vm, VmSpec, VmState, check_labels, check_name, check_spec, pending_changes

replace = msgspec.structs.replace

SPEC_FIELDS = frozenset(
    {"cpus", "memory", "cpu_limit", "cpu_model", "disks", "nics", "boot", "display", "autostart", "protected"}
    | {"stop_timeout_s", "last_valid"}
)


def _check_disks(old: VmSpec, new: VmSpec) -> None:
    """Disks may grow and change limits; adding and removing them is a later verb. Raises ``invalid``."""
    before = {d.name: d for d in old.disks}
    if [d.name for d in new.disks] != [d.name for d in old.disks]:
        raise invalid("disks cannot be added or removed here", hint=f"this VM has: {', '.join(before) or 'none'}")
    for disk in new.disks:
        was = before[disk.name]
        if disk.size < was.size:
            raise invalid(
                f"disk {disk.name} has {format_size(was.size)} and cannot shrink to {format_size(disk.size)}",
                hint="make a new, smaller disk and copy inside the guest",
            )
        if (disk.image, disk.format) != (was.image, was.format):
            raise invalid(f"the image and format of disk {disk.name} cannot change")


def changed(vm: Vm, body: VmSet) -> Vm:
    """``vm`` with what ``body`` sets. Raises ``invalid``."""
    spec_changes = {f: v for f in SPEC_FIELDS if (v := getattr(body, f)) is not msgspec.UNSET}
    spec = check_spec(replace(vm.spec, **spec_changes))
    spec = replace(spec, nics=with_macs(vm.id, spec.nics))
    _check_disks(vm.spec, spec)
    labels = dict(vm.labels)
    if body.labels is not msgspec.UNSET:
        for key, value in body.labels.items():
            if value is None:
                labels.pop(key, None)
            else:
                labels[key] = value
    return replace(
        vm,
        spec=spec,
        labels=check_labels(labels),
        name=vm.name if body.name is msgspec.UNSET else check_name(body.name, "VM name"),
        description=vm.description if body.description is msgspec.UNSET else body.description,
    )


async def plan(proposal: Proposal) -> None:
    """The change is the user's intent, so it is written when it is accepted; the steps bring it to the machine."""
    assert proposal.vm is not None
    assert isinstance(proposal.params, VmSet)
    env, old = proposal.env, proposal.vm.value
    new = changed(old, proposal.params)
    if proposal.expected is VmState.SUSPENDED and (fields := pending_changes(new.spec, old.spec)):
        raise MicaError(
            Code.STATE_CONFLICT,
            f"VM {old.name} is suspended: its memory is that of a machine whose {', '.join(fields)} cannot change",
            hint=f"resume it first; or give its memory up: `mica vm stop --discard {old.name}`",
        )
    if new.spec != old.spec:
        await env.hypervisor.check(new.spec)
    if new.name != old.name:
        await claim_name(env, proposal.draft, new.name, old.id)
        proposal.draft.delete(env.records.names, old.name)
        proposal.target_name = new.name
    proposal.stored_params = {"old": msgspec.to_builtins(old)}
    proposal.draft.put(env.records.vms, old.id, new, proposal.vm.generation)


async def record(context: Context) -> None:
    """The row was written when the request was accepted; this step is where taking it back is anchored."""


async def undo_record(context: Context) -> None:
    """Take back what this request changed and nobody has changed again since."""
    env = context.env
    old = msgspec.convert(context.operation.params["old"], Vm)
    new = changed(old, msgspec.convert(_body(context), VmSet))

    async def write(draft: Draft) -> None:
        now = await env.records.vms.get(context.vm_id)
        if now is None:
            return
        back = _taken_back(now.value, old, new)
        if back.name != now.value.name:
            taken = await env.records.names.get(old.name)
            if taken is not None or back.deleted_at is not None:
                # Somebody else is called that by now, or the VM has no name while it lies in the trash.
                back = replace(back, name=now.value.name)
            else:
                draft.delete(env.records.names, now.value.name)
                await claim_name(env, draft, old.name, old.id)
        if back != now.value:
            draft.put(env.records.vms, old.id, back, now.generation)

    await env.records.transact(write)


def _body(context: Context) -> dict[str, Any]:
    """The request's own parameters, without what was stored with them."""
    return {k: v for k, v in context.operation.params.items() if k in VmSet.__struct_fields__}


def _taken_back(now: Vm, old: Vm, new: Vm) -> Vm:
    spec = {f: getattr(old.spec, f) for f in SPEC_FIELDS if getattr(now.spec, f) == getattr(new.spec, f)}
    # A label that is as this request left it becomes what it was before; any other has been changed again since.
    same = {k for k in {*old.labels, *now.labels} if now.labels.get(k) == new.labels.get(k)}
    labels = {k: v for k, v in now.labels.items() if k not in same}
    labels.update({k: v for k, v in old.labels.items() if k in same})
    return replace(
        now,
        spec=replace(now.spec, **spec),
        labels=labels,
        name=old.name if now.name == new.name else now.name,
        description=old.description if now.description == new.description else now.description,
    )


async def _apply(context: Context, spec: VmSpec) -> None:
    env = context.env
    status = (await env.records.statuses.need(context.vm_id)).value
    if status.runtime is None:
        return
    machine = await env.machines.attach(context.vm_id)
    if machine is None:
        return
    await machine.apply(spec)
    if status.runtime.slice:
        # vCPUs and RAM of the running machine are those it was started with; only the ceiling moves now.
        live = replace(status.runtime.spec, cpu_limit=spec.cpu_limit)
        limits = slice_limits(live, env.hypervisor.overhead(live), frozen=status.runtime.incarnation > 0)
        await env.slices.update(status.runtime.slice, limits)


async def apply(context: Context) -> list[str]:
    vm = (await context.env.records.vms.need(context.vm_id)).value
    await _apply(context, vm.spec)
    status = (await context.env.records.statuses.need(context.vm_id)).value
    return list(pending_changes(vm.spec, status.runtime.spec)) if status.runtime else []


async def undo_apply(context: Context) -> None:
    try:
        await _apply(context, msgspec.convert(context.operation.params["old"], Vm).spec)
    except MicaError:
        if not await context.env.machines.ended(context.vm_id):
            raise


def result(context: Context) -> dict[str, Any]:
    return {"pending": context.outputs["apply"]}


STEPS = (
    Step("record", record, undo_record, words="writing it down"),
    Step("apply", apply, undo_apply, words="changing what can be changed while it runs"),
)

DEFINITION = Definition(
    verb=VmVerb.SET,
    noun="vm",
    params=VmSet,
    plan=plan,
    steps=lambda _: STEPS,
    state_verb=VmVerb.SET,
    result=result,
    anchored=True,
)
