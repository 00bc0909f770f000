"""Damaged parts: finding them, marking them, and knowing what depends on them.

A part is marked by whoever reads it (scrubbing, verifying, going back, starting), and unmarked the same way when it is
found good again: somebody may have restored the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec
import structlog

from mica.engine.definition import Env
from mica.engine.records import Draft, Versioned
from mica.model.errors import Code, MicaError
from mica.model.snapshot import HISTORY, Part, Snapshot, SnapshotKind, SnapshotState
from mica.model.units import Bytes
from mica.model.vm import Vm, VmStatus

log = structlog.get_logger()
replace = msgspec.structs.replace

# Errors that say that data is not what it was; everything else says that it could not be read just now.
DAMAGE = (Code.CORRUPT, Code.NOT_FOUND)


def closure(parts: Mapping[str, Part], roots: Iterable[str]) -> list[str]:
    """Ids of the parts and of all that they lie over, each once, nearest first."""
    found, waiting = dict.fromkeys(roots), list(roots)
    while waiting:
        part = parts.get(waiting.pop(0))
        if part is not None and part.base and part.base not in found:
            found[part.base] = None
            waiting.append(part.base)
    return list(found)


def wrong(parts: Mapping[str, Part], roots: Iterable[str]) -> tuple[str, ...]:
    """What is known to be wrong with the parts and what they lie over, in words."""
    known = (parts[id_] for id_ in closure(parts, roots) if id_ in parts)
    return tuple(f"{part.kind} {part.name}".strip() + f": {part.damaged}" for part in known if part.damaged)


def vm_roots(vm: Vm, status: VmStatus | None) -> tuple[str, ...]:
    """What the VM is over now: the layers below its disks, and the memory that its machine maps."""
    runtime = status.runtime if status is not None else None
    return (*vm.layers.values(), *((runtime.ram,) if runtime is not None and runtime.ram else ()))


async def read_parts(env: Env) -> dict[str, Part]:
    return {id_: row.value for id_, row in (await env.records.parts.scan()).items()}


class Dependents(msgspec.Struct, frozen=True):
    """Whatever would not be what it was: snapshots, and VMs (forks among them)."""

    snapshots: tuple[Versioned[Snapshot], ...]
    vms: tuple[Versioned[Vm], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*sorted(map(_named, self.snapshots)), *sorted(f"VM {row.value.name}" for row in self.vms))


def _named(row: Versioned[Snapshot]) -> str:
    snapshot = row.value
    if snapshot.kind is SnapshotKind.TEMPLATE:
        return f"template {snapshot.name}"
    return f"snapshot {snapshot.vm_name}/{snapshot.name}"


async def dependents(env: Env, part_id: str) -> Dependents:
    parts = await read_parts(env)
    snapshots = (await env.records.snapshots.scan()).values()
    statuses = await env.records.statuses.scan()
    vms = []
    for id_, row in (await env.records.vms.scan()).items():
        status = statuses[id_].value if id_ in statuses else None
        if part_id in closure(parts, vm_roots(row.value, status)):
            vms.append(row)
    return Dependents(
        tuple(row for row in snapshots if part_id in closure(parts, row.value.parts)),
        tuple(vms),
    )


async def mark(env: Env, part_id: str, found: str) -> None:
    """Write down what a check found, empty when nothing. Readers are told of all that depends on the part."""
    changed: list[Dependents] = []

    async def write(draft: Draft) -> None:
        changed.clear()
        row = await env.records.parts.get(part_id)
        if row is None:
            return  # nothing needs it any more
        draft.put(
            env.records.parts, part_id, replace(row.value, damaged=found, verified_at=env.clock.now()), row.generation
        )
        if bool(found) == bool(row.value.damaged):
            return
        touched = await dependents(env, part_id)
        changed.append(touched)
        # Their rows stay as they are, and are written so that whoever follows events looks at them again.
        for snapshot in touched.snapshots:
            draft.put(env.records.snapshots, snapshot.value.id, snapshot.value, snapshot.generation)
        for vm in touched.vms:
            status = await env.records.statuses.get(vm.value.id)
            if status is not None:
                draft.put(env.records.statuses, vm.value.id, status.value, status.generation)

    await env.records.transact(write)
    for touched in changed:
        if found:
            log.error("a part of snapshots is damaged", part=part_id, found=found, needed_by=touched.names)
        else:
            log.info("a part of snapshots is good again", part=part_id, needed_by=touched.names)


async def check(
    env: Env, part: Part, report: Callable[[float], None] = lambda _: None, *, rate: Bytes | None = None
) -> str:
    """Read the part, compare it with its checksum, and mark it. Returns what is wrong, empty when nothing.

    One without a checksum is taken as it is. Raises what keeps it from being read and is no damage.
    """
    if not part.digest:
        return part.damaged
    found = ""
    try:
        await env.parts.verify(part.id, part.digest, report, rate=rate)
    except MicaError as error:
        if error.code not in DAMAGE:
            raise
        row = await env.records.parts.get(part.id)
        if part.merging is not None or (row is not None and row.value.digest != part.digest):
            return part.damaged  # its file is being replaced just now
        found = error.message
    await mark(env, part.id, found)
    return found


async def last_valid(env: Env, vm: Vm) -> list[Snapshot]:
    """Snapshots of the VM that it may go back to, as far as is known without reading them, the newest first."""
    parts, present = await read_parts(env), await env.parts.present()
    images = {id_ for id_, row in (await env.records.images.scan()).items() if not row.value.damaged}

    def good(snapshot: Snapshot) -> bool:
        needed = closure(parts, snapshot.parts)
        return all(
            id_ in parts
            and id_ in present
            and not parts[id_].damaged
            and (not parts[id_].image or parts[id_].base != "" or parts[id_].image in images)
            for id_ in needed
        )

    mine = [row.value for row in (await env.records.snapshots.scan()).values() if row.value.vm_id == vm.id]
    whole = [s for s in mine if s.state is SnapshotState.COMPLETE and s.kind in HISTORY]
    return sorted((s for s in whole if good(s)), key=lambda s: (s.created_at, s.id), reverse=True)


async def sound(env: Env, vm: Vm) -> None:
    """Raises ``corrupt`` when a layer of the VM's disks is damaged. What is marked is read again: it may be good."""
    parts = await read_parts(env)
    for id_ in closure(parts, vm.layers.values()):
        part = parts.get(id_)
        if part is None or not part.damaged:
            continue
        if found := await check(env, part):
            raise _damaged(vm, part, found)


async def unmarked(env: Env, vm: Vm) -> None:
    """As :func:`sound`, and quick: what is marked is believed."""
    parts = await read_parts(env)
    for id_ in closure(parts, vm.layers.values()):
        if id_ in parts and parts[id_].damaged:
            raise await explained(env, vm, _damaged(vm, parts[id_], parts[id_].damaged))


def _damaged(vm: Vm, part: Part, found: str) -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"disk {part.name} of {vm.name} lies over a damaged layer: {found}",
        hint=f"restore the file from a backup of this host, then `mica vm start {vm.name}` looks at it again",
        details={"part": part.id, "found": found},
    )


async def explained(env: Env, vm: Vm, error: MicaError) -> MicaError:
    """The error that keeps a VM from starting, with the way out where there is one."""
    if error.code not in DAMAGE:
        return error
    back = await last_valid(env, vm)
    if not back:
        return error
    return MicaError(
        error.code,
        f"VM {vm.name} cannot start: {error.message}. The last valid snapshot is {back[0].name}",
        hint=f"`mica vm start {vm.name} --last-valid` goes back to it and keeps the damaged state aside",
        retryable=error.retryable,
        details={**error.details, "last_valid": back[0].name},
    )
