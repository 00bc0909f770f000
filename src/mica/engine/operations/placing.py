"""Names and slots for VMs and snapshots that are about to be."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.model.errors import Code, MicaError
from mica.model.image import BUILT_IN
from mica.model.snapshot import SnapshotKind
from mica.model.vm import Vm, check_name

# Slots number the VMs of a host; a private /24 network and a user id derive from each.
MAX_SLOTS = 16384
# A name is at most 63 characters, and a made one ends with a hyphen and a number.
MAX_STEM = 56
# More would make every look at a VM slow, and nobody could choose among them.
MAX_SNAPSHOTS = 1000

# What a snapshot is called that nobody named.
STEMS = {
    SnapshotKind.USER: "snapshot",
    SnapshotKind.SAFETY: "before-restore",
    SnapshotKind.SCHEDULE: "auto",
    SnapshotKind.FORK: "fork",
    SnapshotKind.SUSPEND: "suspend",
    SnapshotKind.BOOT: "boot",
}


async def free_slot(env: Env) -> int:
    taken = {int(id_) for id_ in await env.records.slots.scan()}
    slot = next((n for n in range(MAX_SLOTS) if n not in taken), None)
    if slot is None:
        raise MicaError(Code.BUSY, f"this host has {MAX_SLOTS} VMs already", hint="delete some")
    return slot


async def free_name(env: Env, stem: str) -> str:
    stem = stem[:MAX_STEM].rstrip("-")
    taken = set(await env.records.names.scan(after=stem[:-1]))
    return next(name for n in range(1, MAX_SLOTS + 2) if (name := f"{stem}-{n}") not in taken)


async def snapshot_name(env: Env, vm: Vm, kind: SnapshotKind, wanted: str) -> str:
    """The name of a snapshot that is to be, ``wanted`` or one that is free. Raises ``exists``, ``invalid``, and
    ``state-conflict`` when the VM has too many."""
    if kind is SnapshotKind.TEMPLATE:
        return await check_template_name(env, wanted) if wanted else await _free_template(env, vm.name)
    rows = [row.value for row in (await env.records.snapshots.scan()).values()]
    names = {row.name for row in rows if row.vm_id == vm.id and row.kind is not SnapshotKind.TEMPLATE}
    if len(names) >= MAX_SNAPSHOTS:
        raise MicaError(
            Code.STATE_CONFLICT,
            f"VM {vm.name} has {len(names)} snapshots, and may have {MAX_SNAPSHOTS}",
            hint=f"delete some: `mica snapshot list {vm.name}`",
        )
    if not wanted:
        return next(name for n in range(1, MAX_SNAPSHOTS + 2) if (name := f"{STEMS[kind]}-{n}") not in names)
    if check_name(wanted, "snapshot name") in names:
        raise MicaError(
            Code.EXISTS, f"VM {vm.name} has a snapshot {wanted} already", hint="choose another name, or delete that one"
        )
    return wanted


async def check_template_name(env: Env, name: str) -> str:
    """``name`` if a template may be called that: `mica run NAME` has to mean one thing. Raises ``exists``."""
    if check_name(name, "template name") in await _template_names(env):
        raise MicaError(
            Code.EXISTS,
            f"there is an image or a template {name} already",
            hint="choose another name: `mica run` takes images and templates",
        )
    return name


async def _template_names(env: Env) -> set[str]:
    """Those that a template may not have."""
    images = {row.value.image.name for row in (await env.records.images.scan()).values()}
    return {*BUILT_IN, *images, *await env.records.template_names.scan()}


async def _free_template(env: Env, stem: str) -> str:
    taken, stem = await _template_names(env), stem[:MAX_STEM].rstrip("-")
    return next(name for n in range(len(taken) + 1) if (name := f"{stem}-{n + 1}" if n else stem) not in taken)
