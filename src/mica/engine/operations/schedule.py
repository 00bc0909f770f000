"""``schedule.create`` and ``schedule.delete``; what is due is :mod:`mica.engine.reconcilers.schedules`'s work."""

from __future__ import annotations

from typing import Any

from mica.engine.definition import Context, Definition, NoParams, Proposal, Step
from mica.engine.records import Draft
from mica.model.errors import Code, MicaError, invalid
from mica.model.schedule import MAX_SCHEDULES, Schedule, ScheduleCreate, check_every, parse_keep
from mica.model.vm import check_labels
from mica.ports.store import ABSENT


async def plan_create(proposal: Proposal) -> None:
    assert isinstance(proposal.params, ScheduleCreate)
    env, body = proposal.env, proposal.params
    if bool(body.vm) == bool(body.label):
        raise invalid("a schedule is for one VM or for a label", hint="give one of the two")
    known = await env.records.schedules.scan()
    if len(known) >= MAX_SCHEDULES:
        raise MicaError(Code.STATE_CONFLICT, f"there are {MAX_SCHEDULES} schedules already", hint="delete some")
    label, _, value = body.label.partition("=")
    if label:
        check_labels({label: value})
    vm_id = await env.records.resolve_vm(body.vm) if body.vm else ""
    proposal.target_name = (await env.records.vms.need(vm_id)).value.name if vm_id else body.label
    schedule = Schedule(
        id=proposal.target_id,
        every_s=check_every(body.every_s),
        keep=parse_keep(body.keep),
        created_at=env.clock.now(),
        created_by=proposal.by.name,
        vm_id=vm_id,
        label=label,
        value=value,
        memory=body.memory,
    )
    proposal.draft.put(env.records.schedules, schedule.id, schedule, ABSENT)


async def plan_delete(proposal: Proposal) -> None:
    row = await proposal.env.records.schedules.need(proposal.target_id)
    proposal.target_name = row.value.label or row.value.vm_id[:8]
    if row.value.vm_id and (vm := await proposal.env.records.vms.get(row.value.vm_id)) is not None:
        proposal.target_name = vm.value.name


async def written(context: Context) -> None:
    """It was written when the request was accepted; this step is where taking it back is anchored."""


async def forget(context: Context) -> None:
    env, id_ = context.env, context.operation.target.partition("/")[2]

    async def write(draft: Draft) -> None:
        if await env.records.schedules.get(id_) is not None:
            draft.delete(env.records.schedules, id_)

    await env.records.transact(write)


def result(context: Context) -> dict[str, Any]:
    return {"id": context.operation.target.partition("/")[2]}


CREATE_DEFINITION = Definition(
    verb="schedule.create",
    noun="schedule",
    params=ScheduleCreate,
    plan=plan_create,
    steps=lambda _: (Step("written", written, forget, words="writing it down"),),
    result=result,
    creates=True,
    anchored=True,
)
DELETE_DEFINITION = Definition(
    verb="schedule.delete",
    noun="schedule",
    params=NoParams,
    plan=plan_delete,
    steps=lambda _: (Step("forget", forget, cancellable=False, words="deleting it"),),
)
