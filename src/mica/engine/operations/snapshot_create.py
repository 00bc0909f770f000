"""``snapshot.create``: the whole machine at one moment, while it runs, is paused or stopped.

    look ──► freeze ──► spare ──► quiesce ──► hold ──► go on ──► thaw ──► keep ──► save ──► finish
             disks get   (1)      guest's    paused    running            usable   on disk, with checksums
             new layers           file systems

A machine whose RAM is its own (1) goes on as a private child of it: a second QEMU is started beside it, waiting, and
takes over while the first one is paused. One that is such a child already stays where it is, and what it changed since
is written down; unless that has become much: then it goes on as a child of a new RAM image, which is copied while it
runs and gets what it changed while it is paused (:mod:`mica.engine.operations.folding`). Once it went on there is no
way back, and none is needed: the machine is over its frozen parts.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from mica.engine.definition import Context, Definition, Proposal, Step
from mica.engine.operations import capturing, forecasting, keeping, quiescing
from mica.engine.operations.capturing import Look, captured_in, snapshot_id, warm
from mica.engine.operations.placing import snapshot_name
from mica.engine.operations.quiescing import check_can_freeze
from mica.engine.records import Claim, Draft
from mica.engine.snapshots import claim_of, draft_remove
from mica.model.snapshot import Snapshot, SnapshotKind
from mica.model.transitions import LIVE, VmVerb
from mica.model.vm import Vm, VmSpec
from mica.ports.store import ABSENT

replace = msgspec.structs.replace


class Take(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters: as :class:`mica.model.views.SnapshotCreate`, and why it is made.

    ``cold``: only of a VM without a process.
    """

    name: str = ""
    memory: bool = True
    quiesce: bool = False
    description: str = ""
    kind: SnapshotKind = SnapshotKind.USER
    cold: bool = False
    schedule: str = ""


async def plan(proposal: Proposal) -> None:
    assert isinstance(proposal.params, Take)
    assert proposal.vm is not None
    if proposal.params.cold and proposal.expected in LIVE:
        raise warm(proposal.vm.value.name)
    await note(proposal, proposal.params, proposal.vm.value)


async def note(proposal: Proposal, body: Take, vm: Vm) -> None:
    """Write the row of a snapshot that is to be taken, and that of its VM, as ``vm``."""
    assert proposal.vm is not None
    env = proposal.env
    name = await snapshot_name(env, vm, body.kind, body.name)
    if body.quiesce:
        check_can_freeze(proposal, vm)
    # The row is written anew each time, so that no two snapshots of a VM can have the same id.
    id_ = str(uuid.uuid5(uuid.UUID(vm.id), f"snapshot/{proposal.vm.generation}"))
    proposal.draft.put(env.records.vms, vm.id, vm, proposal.vm.generation)
    snapshot = Snapshot(
        id=id_,
        vm_id=vm.id,
        vm_name=vm.name,
        name=name,
        spec=_spec_now(proposal),
        created_at=env.clock.now(),
        created_by=proposal.by.name,
        kind=body.kind,
        parent=vm.snapshot,
        description=body.description,
        schedule=body.schedule,
    )
    proposal.draft.put(env.records.snapshots, id_, snapshot, ABSENT)
    table, key = claim_of(env.records, snapshot)
    proposal.draft.put(table, key, Claim(id_, at=snapshot.created_at), ABSENT)
    proposal.stored_params = {"snapshot_id": id_}


def _spec_now(proposal: Proposal) -> VmSpec:
    """What the machine is made of now, whatever waits for its next start."""
    assert proposal.vm is not None
    runtime = proposal.status.value.runtime if proposal.status else None
    return runtime.spec if runtime is not None else proposal.vm.value.spec


async def record(context: Context) -> None:
    """The rows were written when the request was accepted; this step is where taking them back is anchored."""


async def undo_record(context: Context) -> None:
    """Parts that nothing lies over are the reaper's."""
    env, id_ = context.env, snapshot_id(context)

    async def write(draft: Draft) -> None:
        row = await env.records.snapshots.get(id_)
        if row is not None:
            await draft_remove(env, draft, {id_: row})

    await env.records.transact(write)
    await env.parts.drop_scratch(id_)


def result(context: Context) -> dict[str, Any]:
    captured = captured_in(context)
    return {
        "id": snapshot_id(context),
        "pause_s": context.outputs.get("go-on"),
        "lost": list(context.output("look", Look).lost),
        "expected": context.outputs.get("forecast"),
        "changed": captured.changed if captured is not None else 0,
        "frozen": context.outputs.get("quiesce"),
        "thawed": context.outputs.get("thaw", True),
    }


STEPS = (
    Step("record", record, undo_record, words="noting it"),
    Step("look", capturing.look, words="looking at the machine"),
    Step("forecast", forecasting.forecast, words="seeing what it will take"),
    Step("freeze", keeping.freeze, keeping.undo_freeze, words="making new layers for its disks"),
    Step("spare", capturing.spare, capturing.undo_spare, timeout_s=3600.0, words="starting the machine that goes on"),
    Step("quiesce", quiescing.freeze, quiescing.undo_freeze, words="freezing the guest's file systems"),
    Step("hold", capturing.hold, capturing.undo_hold, cancellable=False, words="taking its state"),
    Step("go-on", capturing.go_on, capturing.undo_go_on, cancellable=False, words="letting it go on"),
    Step("thaw", quiescing.thaw, cancellable=False, follows=True, words="thawing the guest's file systems"),
    Step("keep", keeping.keep, cancellable=False, follows=True, words="keeping its state"),
    Step("save", keeping.save, timeout_s=7200.0, words="writing it to disk"),
    Step("finish", keeping.finish, cancellable=False, words="letting go of what it needed"),
)

DEFINITION = Definition(
    verb=VmVerb.SNAPSHOT,
    noun="vm",
    params=Take,
    plan=plan,
    steps=lambda _: STEPS,
    state_verb=VmVerb.SNAPSHOT,
    result=result,
    anchored=True,
)
