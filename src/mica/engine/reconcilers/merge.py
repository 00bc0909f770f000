"""Layers of disks that nothing needs but the one layer over them are merged into that one.

    choose ──► note ──► merge (slowly, beside) ──► note the result ──► put in place ──► settle
                        again from the beginning                       again            once nothing is under way
                        when the daemon dies                                            on what lies over it

What a note says is in the row of the part. A machine that runs keeps the files it has open. The layers that were merged
away stay needed until the last step, so an operation that has just looked at a chain still finds it.
"""

from __future__ import annotations

import msgspec

from mica.engine.damage import check, dependents, read_parts
from mica.engine.definition import Env
from mica.model.errors import MicaError
from mica.model.snapshot import Merged, Part, PartKind

replace = msgspec.structs.replace

_LAYERS = (PartKind.DISK, PartKind.NVRAM)


async def reconcile(env: Env) -> str:
    for part in (await read_parts(env)).values():
        if part.merging is not None:
            await _go_on(env, part)
    merged, passed = 0, set[str]()
    while chosen := await _choose(env, passed):
        passed.add(chosen[0].id)
        merged += await _merge(env, chosen)
    return f"merged {merged} layers of disks into those over them" if merged else ""


async def _choose(env: Env, passed: set[str]) -> list[Part] | None:
    """A layer and those directly below it that nothing else needs, nearest first."""
    parts = await read_parts(env)
    needed = set[str]()
    for snapshot in (await env.records.snapshots.scan()).values():
        needed |= set(snapshot.value.parts)
    for vm in (await env.records.vms.scan()).values():
        needed |= set(vm.value.layers.values())
    over: dict[str, int] = {}
    for part in parts.values():
        over[part.base] = over.get(part.base, 0) + 1
    for part in sorted(parts.values(), key=lambda part: part.created_at):
        # What only one layer needs is merged into that one, and what none needs goes.
        passing = part.id not in needed and over.get(part.id, 0) < 2
        if part.kind not in _LAYERS or part.id in passed or passing or part.merging is not None:
            continue
        run = [part]
        while (base := parts.get(run[-1].base)) and base.id not in needed and over[base.id] == 1:
            run.append(base)
        whole = all(one.merging is None and not one.damaged for one in run)
        if len(run) > 1 and whole and not await _busy(env, part.id):
            return run
    return None


async def _busy(env: Env, part_id: str) -> bool:
    """Whether an operation is under way on something that lies over the part."""
    touched = await dependents(env, part_id)
    ids = {row.value.id for row in touched.snapshots} | {row.value.vm_id for row in touched.snapshots}
    ids |= {row.value.id for row in touched.vms}
    for row in (await env.records.operations.scan()).values():
        operation = row.value
        if operation.state.ended:
            continue
        of = {operation.target.partition("/")[2], *(v for v in operation.params.values() if isinstance(v, str))}
        if of & ids:
            return True
    return False


async def _merge(env: Env, run: list[Part]) -> int:
    """How many layers are gone. A run that turns out damaged, or for which there is no room, stays as it is."""
    top, *below = run
    for part in run:
        if await check(env, part):  # or the damage would get a checksum of its own
            return 0
    base = below[-1].base
    await env.records.parts.update(top.id, lambda p: replace(p, merging=Merged(base=base)))
    try:
        seal = await env.branches.merge(top.id, len(below))
    except MicaError:
        await _drop(env, top.id)
        raise
    ready = Merged(base=base, size=seal.size, digest=seal.digest)
    noted = await env.records.parts.update(top.id, lambda p: replace(p, merging=ready))
    await _go_on(env, noted.value)
    return len(below)


async def _go_on(env: Env, part: Part) -> None:
    """From wherever the part's row says that its merging stands."""
    ready = part.merging
    if ready is None:
        return
    if not ready.digest:
        await _drop(env, part.id)
        return
    await env.branches.put_merged(part.id)
    if await _busy(env, part.id):
        return  # it may have read the chain as it was; the next round looks again
    now = env.clock.now()

    def settled(old: Part) -> Part:
        return replace(old, base=ready.base, size=ready.size, digest=ready.digest, verified_at=now, merging=None)

    await env.records.parts.update(part.id, settled)
    await env.branches.drop_merged(part.id)


async def _drop(env: Env, part_id: str) -> None:
    await env.branches.drop_merged(part_id)
    await env.records.parts.update(part_id, lambda p: replace(p, merging=None))
