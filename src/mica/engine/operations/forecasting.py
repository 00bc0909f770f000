"""What a snapshot is going to take, before anything is touched: space on the disk, and how long its machine stands."""

from __future__ import annotations

import statistics

import msgspec

from mica.engine.damage import read_parts
from mica.engine.definition import Context, Env
from mica.model.errors import Code, MicaError
from mica.model.snapshot import Part, SnapshotKind
from mica.model.units import MIB, Bytes, format_size
from mica.ports.hypervisor import Forecast

# A pause that is longer is said beforehand. Seconds.
LONG_PAUSE_S = 0.25
# What a machine stands still for however little it has changed. Seconds.
BASE_PAUSE_S = 0.03
# Changed memory that is written down in a second, where no snapshot of this host tells yet. Bytes.
USUAL_RATE = 500e6
# Snapshots that tell; smaller changes say more of other things.
_TELLING, _TELLING_SIZE = 10, 8 * MIB
# An empty layer with its record, and the state of the devices.
_LAYER, _DEVICES = 2 * MIB, 4 * MIB
# Snapshots that are named as a way out.
_NAMED = 3


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """``size`` is what the snapshot will write at most, in bytes; ``pause_s`` how long its machine will stand still."""

    size: Bytes
    pause_s: float


async def forecast(context: Context) -> Expected | None:
    """Raises ``insufficient-disk`` naming what could be deleted. ``None`` for the moment of a fork, which must not wait
    for that and is not written to disk as a whole."""
    env, found = context.env, context.outputs["look"]
    if context.operation.params["kind"] == SnapshotKind.FORK:
        return None
    status = (await env.records.statuses.need(context.vm_id)).value
    wanted = Forecast()
    if found["memory"] and status.runtime is not None and (machine := await env.machines.attach(context.vm_id)):
        wanted = await machine.forecast()
        if found.get("fold"):
            whole = min(wanted.ram + wanted.changed, status.runtime.spec.memory)
            wanted = Forecast(ram=Bytes(whole - wanted.changed), changed=wanted.changed)
        elif status.runtime.ram in await env.parts.present():
            wanted = Forecast(changed=wanted.changed)  # its RAM image is on disk already
    disks = len(await env.branches.disks(context.vm_id))
    needed = wanted.ram + wanted.changed + disks * _LAYER + (_DEVICES if found["memory"] else 0)
    try:
        await env.parts.need_space(Bytes(needed))
    except MicaError as error:
        if error.code is not Code.INSUFFICIENT_DISK:
            raise
        raise await _full(env, context.operation.target_name, needed, error) from error
    pause_s = await expected_pause(env, wanted.changed) if found["live"] else 0.0
    if pause_s > LONG_PAUSE_S:
        context.report(
            None, f"it will stand still for about {pause_s:.1f} s, for {format_size(wanted.changed)} of changed memory"
        )
    return Expected(size=Bytes(needed), pause_s=round(pause_s, 3))


async def expected_pause(env: Env, changed: Bytes) -> float:
    """How long a machine that has changed so much stands still, in seconds."""
    return BASE_PAUSE_S + changed / await _rate(env)


async def _rate(env: Env) -> float:
    """Bytes per second at which changed memory was written in the last snapshots."""
    parts = await read_parts(env)
    taken = sorted((row.value for row in (await env.records.snapshots.scan()).values()), key=lambda s: -s.created_at)
    rates = [
        parts[s.memory.changes].size / s.pause_s
        for s in taken
        if s.memory is not None
        and s.pause_s
        and s.memory.changes in parts
        and parts[s.memory.changes].size >= _TELLING_SIZE
    ]
    return statistics.median(rates[:_TELLING]) if rates else USUAL_RATE


async def _full(env: Env, name: str, needed: int, error: MicaError) -> MicaError:
    """What would make room: the largest snapshots that may be deleted."""
    ways = [f"{label} ({format_size(size)})" for label, size in (await _largest(env))[:_NAMED] if size]
    advice = f"deleting snapshots makes room: {', '.join(ways)}; `mica snapshot delete VM NAME`" if ways else error.hint
    return MicaError(
        Code.INSUFFICIENT_DISK,
        f"a snapshot of {name} takes up to {format_size(needed)}: {error.message}",
        hint=advice,
        retryable=True,
        details=error.details,
    )


async def _largest(env: Env) -> list[tuple[str, int]]:
    """Snapshots with what each alone has on the disk, the largest first, the oldest of equals."""
    parts = await read_parts(env)
    rows = sorted((row.value for row in (await env.records.snapshots.scan()).values()), key=lambda s: s.created_at)
    users: dict[str, int] = {}
    for snapshot in rows:
        for id_ in set(snapshot.parts):
            users[id_] = users.get(id_, 0) + 1
    below = {part.base for part in parts.values()}

    def alone(ids: tuple[str, ...]) -> int:
        own: list[Part] = [parts[i] for i in ids if i in parts and users[i] == 1 and i not in below]
        return sum(part.size for part in own)

    sizes = [(f"{s.vm_name} {s.name}", alone(s.parts)) for s in rows if not s.protected]
    return sorted(sizes, key=lambda entry: -entry[1])
