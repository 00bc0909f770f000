"""All parts are read again and again, slowly, and compared with their checksums: damage is found before it is needed.

Where it stands is in the parts' rows: the one that was checked longest ago is next, whoever dies in between.
"""

from __future__ import annotations

import msgspec

from mica.engine.damage import check, read_parts
from mica.engine.definition import Env
from mica.model.errors import MicaError
from mica.model.snapshot import Part, SnapshotKind, SnapshotState
from mica.model.units import Bytes

replace = msgspec.structs.replace


async def reconcile(env: Env) -> str:
    """Read every part that is due, oldest first."""
    if not env.policy.scrub_rate:
        return ""
    await _seal(env)
    checked, damaged, unread = 0, [], []
    for part in await _due(env):
        row = await env.records.parts.get(part.id)
        if row is None:
            continue  # nothing needs it any more
        try:
            found = await check(env, row.value, rate=Bytes(env.policy.scrub_rate))
        except MicaError as error:
            unread.append(f"{part.id[:8]}: {error.message}")
            continue
        checked += 1
        if found:
            damaged.append(found)
    said = [
        f"read {checked} parts of snapshots" if checked else "",
        f"damaged: {'; '.join(damaged)}" if damaged else "",
        f"could not read {'; '.join(unread)}" if unread else "",
    ]
    return ", ".join(s for s in said if s)


async def _seal(env: Env) -> None:
    """What was set aside in a hurry has no checksum yet."""
    parts = await read_parts(env)
    for row in (await env.records.snapshots.scan()).values():
        if row.value.state is not SnapshotState.COMPLETE or row.value.kind is not SnapshotKind.SAFETY:
            continue
        for id_ in row.value.parts:
            if id_ in parts and not parts[id_].digest and not parts[id_].damaged:
                seal, now = await env.parts.seal(id_, lambda _: None), env.clock.now()
                sealed = {"size": seal.size, "digest": seal.digest, "verified_at": now}
                await env.records.parts.update(id_, lambda part, sealed=sealed: replace(part, **sealed))  # type: ignore[misc]


async def _due(env: Env) -> list[Part]:
    before = env.clock.now() - env.policy.scrub_every_s
    parts = [part for part in (await read_parts(env)).values() if part.digest and (part.verified_at or 0.0) <= before]
    return sorted(parts, key=lambda part: (part.verified_at or 0.0, part.id))
