"""``snapshot.delete``, ``snapshot.set`` and ``snapshot.verify``: what happens to a snapshot without its VM."""

from __future__ import annotations

from typing import Any

import msgspec

from mica.engine.damage import check, closure, read_parts
from mica.engine.definition import Context, Definition, Env, NoParams, Proposal, Step
from mica.engine.operations.placing import check_template_name
from mica.engine.records import Claim, Draft, Versioned
from mica.engine.snapshots import claim_of, draft_remove, in_use, sweep, word
from mica.model.errors import Code, MicaError, invalid
from mica.model.snapshot import HISTORY, Part, Snapshot, SnapshotKind, SnapshotState
from mica.model.standby import check_standby
from mica.model.views import SnapshotSet
from mica.model.vm import check_name
from mica.ports.store import ABSENT

replace = msgspec.structs.replace


async def _named(proposal: Proposal) -> Versioned[Snapshot]:
    row = await proposal.env.records.snapshots.need(proposal.target_id)
    snapshot = row.value
    proposal.target_name = snapshot.name if _is_template(snapshot) else f"{snapshot.vm_name}/{snapshot.name}"
    return row


def _is_template(snapshot: Snapshot) -> bool:
    return snapshot.kind is SnapshotKind.TEMPLATE


async def plan_delete(proposal: Proposal) -> None:
    """Written anew, so that nothing which begins at it can be accepted across this."""
    env, row = proposal.env, await _named(proposal)
    snapshot = row.value
    if snapshot.protected:
        raise MicaError(
            Code.PROTECTED,
            f"{word(snapshot)} is protected from deletion",
            hint=f"`mica template set {snapshot.name} --no-protected` lifts that"
            if _is_template(snapshot)
            else f"`mica snapshot protect {snapshot.vm_name} {snapshot.name} --off` lifts that",
        )
    await _check_asleep(env, snapshot)
    user = await in_use(env, snapshot.id)
    if user is not None:
        raise MicaError(
            Code.IN_USE,
            f"{word(snapshot)} is needed by {user.verb} {user.id[:8]}",
            hint=f"wait for it: `mica operation wait {user.id[:8]}`",
            retryable=True,
        )
    if snapshot.kind in HISTORY:
        await _check_last_good(proposal, snapshot)
    proposal.draft.put(env.records.snapshots, snapshot.id, snapshot, row.generation)


async def _check_asleep(env: Env, snapshot: Snapshot) -> None:
    """Raises ``in-use`` when it is the memory of a suspended VM."""
    status = await env.records.statuses.get(snapshot.vm_id)
    saved = status.value.suspended if status is not None else None
    if saved is not None and saved.snapshot == snapshot.id:
        raise MicaError(
            Code.IN_USE,
            f"snapshot {snapshot.name} is the memory of {snapshot.vm_name}, which is suspended",
            hint=f"`mica vm stop --discard {snapshot.vm_name}` gives it up",
        )


async def _check_last_good(proposal: Proposal, snapshot: Snapshot) -> None:
    """Raises ``protected`` when all others of a VM are damaged: this one is all that is left of its past."""
    records = proposal.env.records
    parts = {id_: row.value for id_, row in (await records.parts.scan()).items()}

    def good(one: Snapshot) -> bool:
        return one.state is SnapshotState.COMPLETE and not any(parts[p].damaged for p in one.parts if p in parts)

    others = [
        row.value
        for row in (await records.snapshots.scan()).values()
        if row.value.vm_id == snapshot.vm_id and row.value.id != snapshot.id and row.value.kind in HISTORY
    ]
    damaged = [one.name for one in others if not good(one)]
    if damaged and good(snapshot) and not any(good(one) for one in others):
        raise MicaError(
            Code.PROTECTED,
            f"snapshot {proposal.target_name} is the last good one: {', '.join(damaged)} cannot be gone back to",
            hint="delete the damaged ones first, or make another snapshot",
        )


async def forget(context: Context) -> None:
    """The row goes. The parts go when nothing needs them."""
    env, id_ = context.env, context.operation.target.partition("/")[2]

    async def write(draft: Draft) -> None:
        row = await env.records.snapshots.get(id_)
        if row is None:
            return
        if (user := await in_use(env, id_)) is not None:
            raise MicaError(Code.IN_USE, f"the snapshot is needed by {user.verb} {user.id[:8]}", retryable=True)
        await draft_remove(env, draft, {id_: row})

    await env.records.transact(write)


async def clear(context: Context) -> str:
    return await sweep(context.env)


async def plan_set(proposal: Proposal) -> None:
    assert isinstance(proposal.params, SnapshotSet)
    env, body, row = proposal.env, proposal.params, await _named(proposal)
    old = row.value
    new = replace(
        old,
        name=old.name if body.name is None else body.name,
        description=old.description if body.description is None else body.description,
        protected=old.protected if body.protected is None else body.protected,
        standby=old.standby if body.standby is None else _standby(old, body.standby),
    )
    if new.name != old.name:
        table, key = claim_of(env.records, new)
        if _is_template(new):
            await check_template_name(env, new.name)
        elif check_name(new.name, "snapshot name") and await table.get(key) is not None:
            raise MicaError(
                Code.EXISTS, f"VM {old.vm_name} has a snapshot {new.name} already", hint="choose another name"
            )
        proposal.draft.put(table, key, Claim(old.id, at=env.clock.now()), ABSENT)
        proposal.draft.delete(*claim_of(env.records, old))
    proposal.draft.put(env.records.snapshots, old.id, new, row.generation)
    proposal.stored_params = {"old": {field: getattr(old, field) for field in SnapshotSet.__struct_fields__}}


def _standby(snapshot: Snapshot, number: int) -> int:
    """How many VMs are to stand by. Raises ``invalid`` where none can."""
    if number and not _is_template(snapshot):
        raise invalid(
            f"no VMs stand by at {word(snapshot)}",
            hint=f"make a template, and set that: `mica template create {snapshot.vm_name}`",
        )
    if number and snapshot.memory is None:
        raise invalid(
            f"{word(snapshot)} has no memory: what begins there boots",
            hint="make one of a VM that runs: `mica template create VM`",
        )
    return check_standby(number)


async def written(context: Context) -> None:
    """It was written when the request was accepted; this step is where taking it back is anchored."""


async def undo_written(context: Context) -> None:
    """Take back what this request changed and nobody has changed again since."""
    env, id_, params = context.env, context.operation.target.partition("/")[2], context.operation.params

    async def write(draft: Draft) -> None:
        row = await env.records.snapshots.get(id_)
        if row is None:
            return
        now = row.value
        old = {f: v for f, v in params["old"].items() if params[f] is not None and getattr(now, f) == params[f]}
        back = replace(now, **old)
        if back.name != now.name:
            table, key = claim_of(env.records, back)
            if await table.get(key) is not None:
                back = replace(back, name=now.name)  # somebody else is called that by now
            else:
                draft.put(table, key, Claim(now.id, at=env.clock.now()), ABSENT)
                draft.delete(*claim_of(env.records, now))
        if back != now:
            draft.put(env.records.snapshots, id_, back, row.generation)

    await env.records.transact(write)


async def plan_verify(proposal: Proposal) -> None:
    row = await _named(proposal)
    if row.value.state is not SnapshotState.COMPLETE:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"snapshot {proposal.target_name} is not complete yet",
            hint="wait for it: `mica operation list`",
            retryable=True,
        )


async def verify(context: Context) -> dict[str, Any]:
    """Read every part that the snapshot consists of, down to the image, and compare it with its checksum."""
    env, id_ = context.env, context.operation.target.partition("/")[2]
    snapshot = (await env.records.snapshots.need(id_)).value
    rows = await read_parts(env)
    wanted = closure(rows, snapshot.parts)
    damaged = {}
    for number, part_id in enumerate(wanted):
        part = rows.get(part_id)
        if part is None or not part.digest:
            continue

        def report(fraction: float, number: int = number, part: Part = part) -> None:
            context.report((number + fraction) / len(wanted), f"reading {part.kind} {part.name}".strip())

        if found := await check(env, part, report):
            damaged[part_id] = found
    return {"parts": len(wanted), "damaged": damaged}


def verdict(context: Context) -> dict[str, Any]:
    return dict(context.outputs["verify"])


DELETE_DEFINITION = Definition(
    verb="snapshot.delete",
    noun="snapshot",
    params=NoParams,
    plan=plan_delete,
    steps=lambda _: (
        Step("forget", forget, cancellable=False, words="deleting it"),
        Step("clear", clear, cancellable=False, follows=True, timeout_s=600.0, words="freeing what nothing needs"),
    ),
)
SET_DEFINITION = Definition(
    verb="snapshot.set",
    noun="snapshot",
    params=SnapshotSet,
    plan=plan_set,
    steps=lambda _: (Step("written", written, undo_written, words="writing it down"),),
    anchored=True,
)
VERIFY_DEFINITION = Definition(
    verb="snapshot.verify",
    noun="snapshot",
    params=NoParams,
    plan=plan_verify,
    steps=lambda _: (Step("verify", verify, timeout_s=7200.0, words="reading it"),),
    result=verdict,
)
