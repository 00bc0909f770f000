"""Images that somebody had to boot are booted once more, for nobody, and the state is kept for everybody after.

One hidden VM at a time, only while memory and processors are to spare, and away with it as soon as they are not. What
the states take on disk is bounded: those that nobody has begun at for longest go first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mica.engine import boots
from mica.engine.boots import Hidden
from mica.engine.definition import Env, NoParams
from mica.engine.operations.snapshot_create import Take
from mica.engine.promises import left
from mica.engine.records import Draft, Versioned
from mica.model.boot import Boot
from mica.model.errors import MicaError
from mica.model.operation import Actor, OperationState
from mica.model.snapshot import Snapshot, SnapshotKind, SnapshotState
from mica.model.units import GIB
from mica.model.views import VmDelete
from mica.model.vm import AgentState, VmState, VmStatus
from mica.ports.store import Conflict

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

BY = Actor("mica", "reconciler:boots")

# A guest whose agent has not answered by then has none that will. Seconds since its start.
BOOT_S = 600.0
# After so long a failure is tried again, and after six times as long each further one. Seconds.
AGAIN_S = 600.0
# A wish that could not be granted for so long is none any more. Seconds.
FORGET_S = 7 * 86400.0
# What stays free of the host's memory beside everything that is promised: one part of so many.
SPARE = 8
# What stays free of its disk. Bytes.
DISK = 2 * GIB
# Each is looked through at every creation; nobody uses more shapes than that.
MAX_STATES = 64


async def reconcile(env: Env, engine: Engine) -> str:
    await _forget(env)
    states, said = await boots.states(env), []
    for id_, row in (await env.records.boots.scan()).items():
        if row.value.vm_id and not engine.waiting(row.value.vm_id):
            said.append(await _bring_on(env, engine, id_, row, states))
    if states:
        said.append(await _trim(env, engine, states))
    if not await boots.hidden(env):
        said.append(await _begin(env, engine))
    return "; ".join(filter(None, said))


async def _forget(env: Env) -> None:
    """Wishes that are old, or of images that are gone, or that nobody grants any more."""
    draft, now = Draft(), env.clock.now()
    for id_, row in (await env.records.boots.scan()).items():
        if row.value.vm_id:
            continue
        image = await env.records.images.get(row.value.spec.image or "")
        if image is None or row.value.wished_at + FORGET_S < now or not env.policy.boot_space:
            draft.delete(env.records.boots, id_, row.generation)
    await _commit(env, draft)


async def _commit(env: Env, draft: Draft) -> None:
    if not draft.empty:
        try:
            await env.records.commit(draft, durable=False)
        except Conflict:
            return  # somebody wishes for it just now; the next round looks again


# ── the hidden VM ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def _bring_on(env: Env, engine: Engine, id_: str, row: Versioned[Boot], states: list[Versioned[Snapshot]]) -> str:
    """One step further: freeze it when its agent has answered, end it when it is frozen or never will be."""
    vm_id, name = row.value.vm_id, row.value.image_name
    mine = [state.value for state in states if state.value.vm_id == vm_id]
    done = any(state.state is SnapshotState.COMPLETE for state in mine)
    status = await env.records.statuses.get(vm_id)
    failed = "" if done else row.value.why or await _failed_operation(env, vm_id)
    if status is None:
        await _settle(env, id_, row, done=done, failed=failed)
        return f"{name} is not booted: {failed}" if failed else ""
    unwanted = "" if done or failed else await _unwanted(env, row.value)
    failed = failed or ("" if done or unwanted else _failure(env, status.value))
    if failed and not row.value.why:  # it is counted when the VM is gone
        await env.records.boots.update(id_, lambda boot: replace(boot, why=failed), durable=False)
    try:
        if done or unwanted or failed:
            await engine.submit("vm.purge", vm_id, VmDelete(purge=True, force=True), by=BY)
        elif _answers(status.value):
            await engine.submit("snapshot.create", vm_id, Take(kind=SnapshotKind.BOOT), by=BY)
    except MicaError as error:
        return f"{name} is not booted yet: {error.message}"
    return f"{name} is booted" if done else f"{name} is not booted: {unwanted or failed}" if unwanted or failed else ""


async def _settle(env: Env, id_: str, row: Versioned[Boot], *, done: bool, failed: str) -> None:
    """The hidden VM is gone: its state is there, or it never came to that, or it gave way to somebody."""
    draft, boot = Draft(), replace(row.value, vm_id="", why=failed)
    if failed:
        boot = replace(boot, failures=boot.failures + 1, failed_at=env.clock.now())
    if done:
        draft.delete(env.records.boots, id_, row.generation)
    else:
        draft.put(env.records.boots, id_, boot, row.generation)
    await _commit(env, draft)


async def _failed_operation(env: Env, vm_id: str) -> str:
    """What went wrong with booting or freezing the VM, if something did."""
    rows = [row.value for row in (await env.records.operations.scan()).values()]
    failed = [o.problem for o in rows if o.target == f"vm/{vm_id}" and o.state is OperationState.FAILED]
    return next((problem.message for problem in failed if problem is not None), "")


async def _unwanted(env: Env, boot: Boot) -> str:
    """Why nobody wants it any more; somebody who needs its memory counts most."""
    if not env.policy.boot_space:
        return "images are not booted once any more"
    if await env.records.images.get(boot.spec.image or "") is None:
        return "the image is gone"
    return "its memory is needed" if (await left(env)).least < 0 else ""


def _failure(env: Env, status: VmStatus) -> str:
    seen = status.observed
    if seen.state is not VmState.RUNNING:
        return f"it is {seen.state}" + (f" ({seen.reason})" if seen.reason else "")
    late = (seen.started_at or seen.since) + BOOT_S < env.clock.now()
    return "its agent does not answer" if late else ""


def _answers(status: VmStatus) -> bool:
    return status.observed.agent is AgentState.READY and bool(status.observed.os)


# ── which one, and when ───────────────────────────────────────────────────────────────────────────────────────────────


async def _begin(env: Env, engine: Engine) -> str:
    """Boot what was wished for last, if this host has nothing better to do."""
    now = env.clock.now()
    rows = sorted((await env.records.boots.scan()).items(), key=lambda item: -item[1].value.wished_at)
    due = [
        (id_, row)
        for id_, row in rows
        if not row.value.failures or row.value.failed_at + AGAIN_S * 6 ** (row.value.failures - 1) <= now
    ]
    if not due:
        return ""
    id_, row = due[0]
    if await boots.find(env, row.value.spec) is not None:  # another round has seen to it
        draft = Draft()
        draft.delete(env.records.boots, id_, row.generation)
        await _commit(env, draft)
        return ""
    if not await _to_spare(env, engine, row.value):
        return ""
    wanted = Hidden(shape=row.value.spec, start=True)
    try:
        await engine.submit("vm.create", "", wanted, by=BY)
    except MicaError as error:
        await _settle(env, id_, row, done=False, failed=error.message)
        return f"{row.value.image_name} is not booted: {error.message}"
    return f"booting {row.value.image_name} for whoever runs it next"


async def _to_spare(env: Env, engine: Engine, boot: Boot) -> bool:
    """Whether this host has memory, processors and disk that nobody would miss."""
    capacity, spec = env.host.capacity(), boot.spec
    need = spec.memory + env.hypervisor.overhead(spec)
    # While it is frozen a second QEMU stands beside it.
    memory = (await left(env)).least >= need + env.hypervisor.overhead(spec) + capacity.memory // SPARE
    live = engine.live()
    processors = env.sampler.busy(live) + min(spec.cpus, capacity.cpus) <= capacity.cpus + 0.5
    disk = spec.memory <= env.policy.boot_space and capacity.disk_free >= spec.memory + DISK
    return memory and processors and disk and not any(engine.waiting(vm_id) for vm_id in live)


# ── what they take ────────────────────────────────────────────────────────────────────────────────────────────────────


async def _trim(env: Env, engine: Engine, states: list[Versioned[Snapshot]]) -> str:
    """Delete states that cannot be begun at any more, and those that were not for longest when all take too much."""
    sizes, parts = await boots.sizes(env), {i: row.value for i, row in (await env.records.parts.scan()).items()}
    kept, taken, gone = 0, 0, []
    for row in sorted(states, key=lambda row: -(row.value.used_at or row.value.created_at)):
        if row.value.state is not SnapshotState.COMPLETE:
            continue  # it is being made
        size = sizes.get(row.value.id, 0)
        fits = taken + size <= env.policy.boot_space and kept < MAX_STATES
        if fits and boots.whole(row.value, parts) and not _is_stale(env, row.value):
            taken, kept = taken + size, kept + 1
        else:
            gone.append(row.value.id)
    refused = 0
    for id_ in gone:
        try:
            await engine.submit("snapshot.delete", id_, NoParams(), by=BY)
        except MicaError:  # somebody begins at it just now
            refused += 1
    return f"gave up {len(gone) - refused} states of images that were booted once" if len(gone) > refused else ""


def _is_stale(env: Env, snapshot: Snapshot) -> bool:
    try:
        return not boots.fits(env, snapshot)
    except MicaError:
        return False  # without a QEMU there is nothing to say about that
