"""Images for a reader: who stands on them, and what there is of them that has booted already."""

from __future__ import annotations

from mica.engine import boots
from mica.engine.definition import Env
from mica.engine.records import ImageRow, Versioned
from mica.engine.snapshots import word
from mica.model.snapshot import SnapshotKind
from mica.model.units import Bytes
from mica.model.views import BootedView, ImageView
from mica.model.vm import VmSpec


async def image_views(env: Env, rows: list[Versioned[ImageRow]]) -> list[ImageView]:
    users, booted = await _users(env), await _booted(env)
    return [
        ImageView(
            image=row.value.image,
            generation=row.generation,
            used_by=tuple(sorted(users.get(row.value.image.digest, []))),
            verified_at=row.value.verified_at,
            damaged=row.value.damaged,
            booted=tuple(booted.get(row.value.image.digest, [])),
        )
        for row in rows
    ]


async def booted_size(env: Env) -> Bytes:
    """What all states of images take which were booted once, in bytes."""
    return Bytes(sum((await boots.sizes(env)).values()))


async def _users(env: Env) -> dict[str, list[str]]:
    """VMs and templates by the digests of the images that they stand on."""
    vms = [row.value for row in (await env.records.vms.scan()).values() if not row.value.hidden]
    kept = [row.value for row in (await env.records.snapshots.scan()).values()]
    named = [(vm.name, vm.spec) for vm in vms]
    named += [(word(snapshot), snapshot.spec) for snapshot in kept if snapshot.kind is SnapshotKind.TEMPLATE]
    users: dict[str, list[str]] = {}
    for name, spec in named:
        for digest in _images(spec):
            users.setdefault(digest, []).append(name)
    return users


def _images(spec: VmSpec) -> set[str]:
    return {digest for digest in (spec.image, *(disk.image for disk in spec.disks)) if digest is not None}


async def _booted(env: Env) -> dict[str, list[BootedView]]:
    sizes = await boots.sizes(env)
    found: dict[str, list[BootedView]] = {}
    for row in sorted(await boots.states(env), key=lambda row: row.value.created_at):
        snapshot = row.value
        view = BootedView(
            id=snapshot.id,
            spec=boots.shape(snapshot.spec),
            size=sizes.get(snapshot.id, Bytes(0)),
            created_at=snapshot.created_at,
            used_at=snapshot.used_at,
        )
        found.setdefault(snapshot.spec.image or "", []).append(view)
    return found
