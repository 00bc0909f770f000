"""Boot once: states at which a VM made from an image begins, instead of booting as every VM of its shape would.

A hidden VM boots the image, belongs to nobody, and is frozen when its agent first answers: a snapshot of kind ``boot``.
What it boots depends on the image and on the shape of the machine alone, so there is one state for each shape.

    cold start ──► wish ──► hidden VM boots ──► frozen ──► every later start of that shape begins there
"""

from __future__ import annotations

import hashlib

import msgspec

from mica.engine.definition import Env
from mica.engine.records import Draft, Versioned
from mica.model.boot import Boot
from mica.model.errors import Code, MicaError
from mica.model.snapshot import Part, Snapshot, SnapshotKind, SnapshotState
from mica.model.units import Bytes
from mica.model.views import VmCreate
from mica.model.vm import IoLimits, NicSpec, VmSpec
from mica.ports.store import ABSENT

replace = msgspec.structs.replace


class Hidden(VmCreate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a ``vm.create`` that nobody asked for: a VM of exactly this shape, which nobody sees."""

    shape: VmSpec


def shape(spec: VmSpec) -> VmSpec:
    """``spec`` without what a guest cannot see while it boots, and what is given to it as its own afterwards."""
    return replace(
        spec,
        cpu_limit=None,
        disks=tuple(replace(disk, limits=IoLimits()) for disk in spec.disks),
        nics=tuple(NicSpec(name=nic.name, network=nic.network) for nic in spec.nics),
        autostart=False,
        protected=False,
        ephemeral=False,
        hostname="",
        stop_timeout_s=VmSpec().stop_timeout_s,
    )


def key(spec: VmSpec) -> str:
    """What the wish for a state of that shape is called."""
    return hashlib.sha256(msgspec.json.encode(shape(spec))).hexdigest()


async def states(env: Env) -> list[Versioned[Snapshot]]:
    return [row for row in (await env.records.snapshots.scan()).values() if row.value.kind is SnapshotKind.BOOT]


def fits(env: Env, snapshot: Snapshot) -> bool:
    """Whether this host's QEMU, as it is now, can go on there. Raises ``host-lacks`` where there is none."""
    return snapshot.memory is not None and snapshot.memory.build == env.hypervisor.build_of(snapshot.spec)


def whole(snapshot: Snapshot, parts: dict[str, Part]) -> bool:
    """Whether all of it is there and nothing is known to be damaged."""
    waiting = list(snapshot.parts)
    while waiting:
        part = parts.get(waiting.pop())
        if part is None or part.damaged:
            return False
        waiting += [part.base] if part.base else []
    return snapshot.state is SnapshotState.COMPLETE


async def find(env: Env, spec: VmSpec) -> Versioned[Snapshot] | None:
    """The state that a machine like that begins at; ``None`` when it has to boot."""
    wanted = shape(spec)
    found = [row for row in await states(env) if shape(row.value.spec) == wanted]
    if not found:
        return None
    parts = {id_: row.value for id_, row in (await env.records.parts.scan()).items()}
    return next((row for row in found if whole(row.value, parts) and fits(env, row.value)), None)


async def wish(env: Env, draft: Draft, spec: VmSpec, image_name: str) -> None:
    """Ask for a state of that shape, which somebody has just had to boot, within ``draft``."""
    row, now = await env.records.boots.get(key(spec)), env.clock.now()
    if row is None:
        draft.put(env.records.boots, key(spec), Boot(shape(spec), image_name, now), ABSENT)
    else:
        draft.put(env.records.boots, key(spec), replace(row.value, wished_at=now), row.generation)


async def hidden(env: Env) -> set[str]:
    """Ids of the VMs that boot for nobody: they give way to all others."""
    return {row.value.vm_id for row in (await env.records.boots.scan()).values() if row.value.vm_id}


async def sizes(env: Env) -> dict[str, Bytes]:
    """What each state takes on disk, in bytes, by its id."""
    parts = {id_: row.value.size for id_, row in (await env.records.parts.scan()).items()}
    return {
        row.value.id: Bytes(sum(parts.get(part, Bytes(0)) for part in row.value.parts)) for row in await states(env)
    }


def vm_name(image_name: str) -> str:
    """What a hidden VM is called in logs and operations. It claims no name."""
    return f"boot-of-{image_name}"[:63].rstrip("-")


def check_still_wished(row: Versioned[Boot] | None) -> Versioned[Boot]:
    if row is None or row.value.vm_id:
        raise MicaError(Code.STATE_CONFLICT, "that is being booted already, or is not wished any more")
    return row
