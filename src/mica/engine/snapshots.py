"""What snapshots and VMs are made of: ids of parts, the state that a machine begins at, what is still needed."""

from __future__ import annotations

import uuid

import msgspec

from mica.engine.damage import check
from mica.engine.definition import Env
from mica.engine.records import Claim, Draft, Records, Table, Versioned
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.snapshot import Part, PartKind, Snapshot, SnapshotKind, SnapshotState
from mica.ports.hypervisor import Origin
from mica.ports.store import ABSENT, Conflict

replace = msgspec.structs.replace

# What a VM does that cannot begin where its image had booted.
COLD = "cold"

# What is checked before a guest runs on it, whatever it takes; RAM images and disk layers are checked by scrubbing.
AT_ONCE = (PartKind.DEVICES, PartKind.CHANGES, PartKind.NVRAM)


def part_id(snapshot_id: str, kind: PartKind, name: str = "") -> str:
    """The id of a part that a snapshot makes: the same however often its steps are repeated."""
    return str(uuid.uuid5(uuid.UUID(snapshot_id), f"{kind}/{name}"))


def origin_of(env: Env, snapshot: Snapshot) -> Origin | None:
    """The state that a machine begins at which goes on from there; ``None`` when it has no memory."""
    memory = snapshot.memory
    if memory is None:
        return None
    return Origin(
        ram=memory.ram,
        ram_file=env.parts.path(memory.ram),
        devices=env.parts.path(memory.devices),
        changes=env.parts.path(memory.changes) if memory.changes else None,
        build=memory.build,
        inside=memory.inside,
    )


def claim_of(records: Records, snapshot: Snapshot) -> tuple[Table[Claim], str]:
    """Where its name is claimed: among those of its VM, or, for what outlives that, among all templates."""
    if snapshot.kind is SnapshotKind.TEMPLATE:
        return records.template_names, snapshot.name
    return records.snapshot_names, f"{snapshot.vm_id}/{snapshot.name}"


def draft_forget(records: Records, draft: Draft, row: Versioned[Snapshot]) -> None:
    """Delete the row of a snapshot that nothing descends from, and the claim on its name, as a part of ``draft``."""
    table, key = claim_of(records, row.value)
    draft.delete(table, key)
    draft.delete(records.snapshots, row.value.id, row.generation)


def word(snapshot: Snapshot) -> str:
    """What it is and what it is called, for a message."""
    if snapshot.kind is SnapshotKind.TEMPLATE:
        return f"template {snapshot.name}"
    return f"snapshot {snapshot.name} of {snapshot.vm_name}"


async def until(env: Env, snapshot_id: str, state: SnapshotState) -> Snapshot:
    """The snapshot as soon as it has come to ``state`` or beyond. Raises ``not-found`` when it could not be taken."""
    order = list(SnapshotState)
    while True:
        revision = await env.records.store.revision()
        row = await env.records.snapshots.get(snapshot_id)
        if row is None:
            raise MicaError(
                Code.NOT_FOUND,
                "the state that it was to begin at could not be taken, or is deleted",
                hint="`mica operation list` says why",
            )
        if order.index(row.value.state) >= order.index(state):
            return row.value
        await env.records.store.wait(revision)


async def put_parts(env: Env, draft: Draft, parts: list[Part]) -> None:
    """Rows before files, so that the reaper knows a file's row whenever it sees the file. Those that are there stay."""
    for part in parts:
        if await env.records.parts.get(part.id) is None:
            draft.put(env.records.parts, part.id, part, ABSENT)


async def needed(env: Env) -> set[str]:
    """Ids of all parts that a snapshot or a VM consists of, with all that they lie over."""
    parts = {id_: row.value for id_, row in (await env.records.parts.scan()).items()}
    roots: set[str] = set()
    for snapshot in (await env.records.snapshots.scan()).values():
        roots |= set(snapshot.value.parts)
    for vm in (await env.records.vms.scan()).values():
        roots |= set(vm.value.layers.values())
    for status in (await env.records.statuses.scan()).values():
        if status.value.runtime is not None and status.value.runtime.ram:
            roots.add(status.value.runtime.ram)
    found: set[str] = set()
    while roots:
        id_ = roots.pop()
        if id_ not in found:
            found.add(id_)
            base = parts[id_].base if id_ in parts else ""
            roots |= {base} if base else set()
    return found


async def in_use(env: Env, snapshot_id: str) -> Operation | None:
    """An operation under way that needs the snapshot."""
    for row in (await env.records.operations.scan()).values():
        if row.value.params.get("held"):
            continue  # a VM that is to stand by is nobody's, and comes to nothing without it
        if not row.value.state.ended and snapshot_id in (
            row.value.params.get("snapshot"),
            row.value.params.get("snapshot_id"),
        ):
            return row.value
    return None


async def need_whole(env: Env, snapshot: Snapshot) -> None:
    """Raises ``corrupt`` when a check has found a part of it damaged."""
    parts = {id_: row.value for id_, row in (await env.records.parts.scan()).items()}
    waiting = list(snapshot.parts)
    while waiting:
        part = parts.get(waiting.pop())
        if part is None:
            raise MicaError(
                Code.CORRUPT,
                f"{word(snapshot)} is not whole: a part of it is not known",
                hint=_instead(snapshot),
            )
        if part.damaged:
            raise MicaError(
                Code.CORRUPT,
                f"{word(snapshot)} is damaged: {part.kind} {part.name}: {part.damaged}",
                hint=_instead(snapshot),
            )
        if part.base:
            waiting.append(part.base)


def _instead(snapshot: Snapshot) -> str:
    if snapshot.kind is SnapshotKind.TEMPLATE:
        return f"make another one of a VM, and delete this: `mica template delete {snapshot.name}`"
    return f"go back to another one: `mica snapshot list {snapshot.vm_name}`"


async def check_parts(env: Env, snapshot: Snapshot, *, memory: bool = True) -> None:
    """Everything that a guest would run on at once is as it was written. What is not is marked. Raises ``corrupt``."""
    for id_ in snapshot.parts:
        part = (await env.records.parts.need(id_)).value
        at_once = part.kind in AT_ONCE and (memory or part.kind is PartKind.NVRAM)
        if at_once and (found := await check(env, part)):
            raise MicaError(
                Code.CORRUPT,
                f"snapshot {snapshot.name} of {snapshot.vm_name} is damaged: {found}",
                hint=f"go back to another one: `mica snapshot list {snapshot.vm_name}`",
            )


async def sweep(env: Env) -> str:
    """Remove every part that nothing needs: its row first, then its file, then what is held of it in memory.

    Says what it did. A file without a row is removed too; a row is always written before its file.
    """
    present = await env.parts.present()
    removed = 0

    async def write(draft: Draft) -> None:
        still = await needed(env)
        # Whoever comes to need a part writes a row of a VM or a snapshot, each of which is read here: that they are
        # still the same is expected too.
        for id_, snapshot in (await env.records.snapshots.scan()).items():
            draft.expect(env.records.snapshots, id_, snapshot.generation)
        for id_, vm in (await env.records.vms.scan()).items():
            draft.expect(env.records.vms, id_, vm.generation)
        for id_, part in (await env.records.parts.scan()).items():
            # One that is being merged into is left alone until that has ended.
            if id_ not in still and part.value.merging is None:
                draft.delete(env.records.parts, id_, part.generation)

    await env.records.transact(write)
    rows = set(await env.records.parts.scan())
    for id_ in sorted(present - rows):
        await env.parts.remove(id_)
        removed += 1
    await cool(env, _warm(env))
    return f"removed {removed} parts of snapshots" if removed else ""


def _warm(env: Env) -> int:
    """Bytes of RAM images that the host can spare for nobody but the next one that begins there."""
    spare = env.host.capacity().available - 2 * env.policy.reserve
    return max(0, min(env.policy.warm, spare // 2))


async def cool(env: Env, keep: int) -> None:
    """Let go of RAM images in memory that no machine maps, but for those used last, up to ``keep`` bytes. What is
    not on disk yet, and may still be needed, stays."""
    parts = {id_: row.value for id_, row in (await env.records.parts.scan()).items()}
    statuses = (await env.records.statuses.scan()).values()
    mapped = {row.value.runtime.ram for row in statuses if row.value.runtime is not None}
    for ram_id in reversed(env.ram.held()):
        part = parts.get(ram_id)
        if ram_id in mapped or (part is not None and not part.digest):
            continue
        keep -= part.size if part is not None else keep + 1
        if keep < 0:
            env.ram.release(ram_id)


async def draft_remove(env: Env, draft: Draft, gone: dict[str, Versioned[Snapshot]]) -> None:
    """Delete snapshots as a part of ``draft``. What descends from them descends from what they descended from.

    Rows of VMs that ``draft`` deletes too must have been deleted in it afterwards.
    """

    def heir(id_: str) -> str:
        while id_ in gone:
            id_ = gone[id_].value.parent
        return id_

    for id_, other in (await env.records.snapshots.scan()).items():
        if id_ not in gone and other.value.parent in gone:
            moved = replace(other.value, parent=heir(other.value.parent))
            draft.put(env.records.snapshots, id_, moved, other.generation)
    for vm in (await env.records.vms.scan()).values():
        if vm.value.snapshot in gone:
            moved_vm = replace(vm.value, snapshot=heir(vm.value.snapshot))
            draft.put(env.records.vms, vm.value.id, moved_vm, vm.generation)
    for row in gone.values():
        draft_forget(env.records, draft, row)


async def forget_passing(env: Env) -> None:
    """The moment at which forks began is of no more use once they have all begun. What is not complete and is not
    being taken any more never will be: an operator has accepted that something was left of it."""
    for id_, row in (await env.records.snapshots.scan()).items():
        snapshot = row.value
        if snapshot.kind is not SnapshotKind.FORK and snapshot.state is SnapshotState.COMPLETE:
            continue
        if await in_use(env, id_) is not None:
            continue
        draft = Draft()
        await draft_remove(env, draft, {id_: row})
        try:
            await env.records.commit(draft)
        except Conflict:
            continue  # somebody begins at it just now; the next round looks again
