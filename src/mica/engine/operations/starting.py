"""The steps that bring a VM up, shared by every verb that does."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog

from mica.engine.damage import explained, sound
from mica.engine.definition import Context, Env, Step
from mica.engine.operations.quiescing import let_go
from mica.engine.operations.reserving import settle_promise
from mica.engine.settle import moved, set_state, stopped, take_down
from mica.engine.snapshots import COLD, origin_of, until
from mica.model.errors import Code, MicaError
from mica.model.identity import Identity, Report
from mica.model.snapshot import Snapshot, SnapshotState
from mica.model.transitions import LIVE
from mica.model.units import Bytes
from mica.model.vm import AgentState, NicRuntime, Vm, VmRuntime, VmSpec, VmState
from mica.ports.hypervisor import LaunchPlan, Origin, RunState, StatefulMachine
from mica.ports.slices import SliceLimits
from mica.ports.volumes import Volume

log = structlog.get_logger()
replace = msgspec.structs.replace


def slice_limits(spec: VmSpec, overhead: int, *, frozen: bool = False) -> SliceLimits:
    """What the VM's control group enforces: its vCPUs' worth of processor, its RAM and QEMU's own memory.

    ``frozen``: what was its RAM is an image below the present one. The group stays charged for that (Linux,
    Documentation/admin-guide/cgroup-v2.rst, "Memory Ownership"), and the guest may come to write all of its RAM anew.
    """
    # QEMU's own threads (devices, block layer) share the group with the vCPUs; half a processor keeps them alive.
    cpus = spec.cpu_limit if spec.cpu_limit is not None else spec.cpus + 0.5
    return SliceLimits(cpus, Bytes(spec.memory * (2 if frozen else 1) + 2 * overhead))


async def _vm(context: Context) -> Vm:
    """The VM with the spec that was admitted."""
    vm = (await context.env.records.vms.need(context.vm_id)).value
    return replace(vm, spec=_spec(context))


def _spec(context: Context) -> VmSpec:
    back = context.outputs.get("salvage")  # what it goes back to had a spec of its own
    return msgspec.convert((back or context.operation.params)["spec"], VmSpec)


async def begin(context: Context) -> str:
    """Returns the boot of the host in which it began: what the next steps make does not outlive that.

    From here the promise is exactly what will run; one that was larger, or was lost to a stop, ends.
    """
    await _check_memory(context)
    begun = await _origin(context, SnapshotState.FROZEN)
    await settle_promise(context, await _vm(context), begun[1].ram if begun is not None else "")
    await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.STARTING))
    return context.env.host.boot_id()


async def _check_memory(context: Context) -> None:
    """What was accepted as going on in its memory does, and nothing else: its disks belong to that."""
    status = (await context.env.records.statuses.need(context.vm_id)).value
    if (status.suspended is not None) != bool(context.operation.params.get("wake")):
        raise MicaError(
            Code.STATE_CONFLICT,
            f"VM {context.operation.target_name} is {status.observed.state} by now, which was not expected",
            hint="start it again",
            retryable=True,
        )


async def undo_begin(context: Context) -> None:
    env, vm_id = context.env, context.vm_id
    status = await env.records.statuses.get(vm_id)
    if status is not None and status.value.observed.state in LIVE and status.value.runtime is None:
        cancelled = context.failure is not None and context.failure.code is Code.CANCELLED
        reason = "its start was cancelled" if cancelled else "it could not be started"
        await stopped(env, vm_id, VmState.STOPPED, reason, context.failure, but=context.operation.id)


async def prepare(context: Context) -> list[Volume]:
    vm = await _vm(context)
    try:
        return await prepared(context.env, vm)
    except MicaError as error:
        raise await explained(context.env, vm, error) from error


async def prepared(env: Env, vm: Vm) -> list[Volume]:
    """The VM's volumes, ready for a machine. Raises ``corrupt``, ``not-found`` when it cannot start from them."""
    await sound(env, vm)
    owner = env.policy.owner(vm.slot)
    volumes = list(await env.volumes.prepare(vm.id, vm.spec.disks, owner))
    nvram = await env.volumes.nvram(vm.id, vm.spec.firmware, owner)
    return [*volumes, nvram] if nvram else volumes


async def undo_prepare(context: Context) -> None:
    """Without a QEMU that could have written to them, the volumes are as they were handed over."""
    if not any(entry.step == "launch" for entry in context.operation.journal):
        await context.env.volumes.settled(context.vm_id)


async def make_slice(context: Context) -> dict[str, Any]:
    vm = await _vm(context)
    limits = slice_limits(vm.spec, context.env.hypervisor.overhead(vm.spec))
    return await context.env.slices.create(vm.id, limits)


async def undo_slice(context: Context) -> None:
    vm_id, handle = context.vm_id, context.outputs.get("slice")
    if handle is None:
        # ``create`` is idempotent, so its handle can be had again whatever it had got to. What cannot be made is not
        # there: a host that refuses slices must not turn each start into a stuck operation.
        try:
            handle = await context.env.slices.create(vm_id, slice_limits(_spec(context), 0))
        except MicaError as error:
            log.warning("no slice to remove", vm=vm_id, error=error.message)
            return
    await context.env.slices.remove(handle)


async def attach_networks(context: Context) -> list[NicRuntime]:
    vm = await _vm(context)
    return [await context.env.networks.attach(vm, nic.name) for nic in vm.spec.nics]


async def undo_networks(context: Context) -> None:
    done = msgspec.convert(context.outputs.get("network", []), list[NicRuntime])
    for nic in _spec(context).nics:
        known = next((n for n in done if n.name == nic.name), NicRuntime(name=nic.name))
        await context.env.networks.detach(context.vm_id, known)


async def plan_launch(
    env: Env,
    vm: Vm,
    volumes: tuple[Volume, ...],
    nics: tuple[NicRuntime, ...],
    slice_: dict[str, Any],
    *,
    origin: Origin | None = None,
    incarnation: int = 0,
    generation_id: str = "",
) -> LaunchPlan:
    """Everything that a machine of the VM, with the spec that ``vm`` has, is started with."""
    image = None
    if vm.spec.image is not None:
        image = (await env.records.images.need(vm.spec.image)).value.image
    direct = image.direct_boot if image and image.disk is None else None
    files = env.images
    return LaunchPlan(
        vm=vm,
        volumes=volumes,
        nics=nics,
        slice=slice_,
        read_only_paths=(files.path(image, image.disk),) if image and image.disk is not None else (),
        direct_boot=direct,
        kernel=files.path(image, direct.kernel) if image and direct else None,
        initrd=files.path(image, direct.initrd) if image and direct else None,
        origin=origin,
        incarnation=incarnation,
        generation_id=generation_id,
    )


async def _origin(context: Context, state: SnapshotState) -> tuple[Snapshot, Origin] | None:
    """The state that this start begins at instead of at power-on, once it has come to ``state``."""
    if context.outputs.get("origin") == COLD:
        return None
    id_ = context.operation.params.get("origin") or (context.outputs.get("salvage") or {}).get("origin")
    if context.operation.params.get("wake"):
        saved = (await context.env.records.statuses.need(context.vm_id)).value.suspended
        id_ = saved.snapshot if saved is not None else None
    if not id_:
        return None
    snapshot = await until(context.env, id_, state)
    found = origin_of(context.env, snapshot)
    return None if found is None else (snapshot, found)


async def launch(context: Context) -> VmRuntime:
    vm = await _vm(context)
    nics = tuple(context.output("network", list[NicRuntime]))
    if context.env.host.boot_id() != context.output("begin", str):
        # The host went down in between, and slices and networks with it. They are taken back under the same names.
        await make_slice(context)
        nics = tuple(await attach_networks(context))
    begun = await _origin(context, SnapshotState.FROZEN)
    if begun is not None and begun[0].disks and context.env.policy.owner(vm.slot) is not None:
        # Until the original has left its layers, no other user may read them.
        begun = await _origin(context, SnapshotState.SAVING)
    volumes = tuple(context.output("prepare", list[Volume]))
    plan = await plan_launch(
        context.env,
        vm,
        volumes,
        nics,
        context.outputs["slice"],
        origin=begun[1] if begun else None,
        # A machine that goes back in time is as much another one for its guest as one that was copied. One that was
        # suspended is not.
        generation_id=context.operation.id if begun and not context.operation.params.get("wake") else "",
    )
    # When this is repeated, an earlier machine may be attached already: it ends now.
    context.env.machines.detach(vm.id)
    runtime = await context.env.hypervisor.launch(plan)
    await context.env.records.statuses.update(
        vm.id,
        lambda s: replace(s, runtime=runtime, observed=replace(s.observed, started_at=runtime.started_at)),
    )
    return runtime


async def undo_launch(context: Context) -> None:
    await take_down(context.env, context.vm_id, clean=False)
    if await context.env.records.statuses.get(context.vm_id) is None:
        return
    await context.env.records.statuses.update(
        context.vm_id,
        lambda s: replace(
            s, runtime=None, observed=replace(s.observed, agent=AgentState.ABSENT, started_at=None, addresses=())
        ),
    )


async def launched(context: Context) -> StatefulMachine:
    """The machine that was launched. Raises ``qemu-failed`` with its last words."""
    machine = await context.env.machines.attach(context.vm_id)
    if machine is None:
        words = await _last_words(context)
        raise MicaError(Code.QEMU_FAILED, f"QEMU ended before the guest ran{': ' + words if words else ''}")
    return machine


async def _last_words(context: Context) -> str:
    """Of the machine that this launched, or that was taken where it stood by."""
    if "launch" in context.outputs:
        return (await context.env.hypervisor.autopsy(context.output("launch", VmRuntime))).last_words
    runtime = (await context.env.records.statuses.need(context.vm_id)).value.runtime
    return (await context.env.hypervisor.autopsy(runtime)).last_words if runtime is not None else ""


async def hold(context: Context) -> None:
    """Bring the machine to the state that it begins at, and hold it near there until somebody takes it (``run``).

    Its guest answers once before: the first steps of a copy are the slow ones, as QEMU has translated nothing and
    copied no page. It has random numbers of its own from then on, its NICs stay unplugged, and nobody can ask it
    anything; who it is it learns when it is taken.
    """
    env, vm_id, machine = context.env, context.vm_id, await launched(context)
    begun = await _origin(context, SnapshotState.SAVING)
    assert begun is not None
    if (await machine.observe()).run is RunState.PRELAUNCH:  # else this is repeated, and it has its state
        await machine.load(begun[1])
    runtime = (await env.records.statuses.need(vm_id)).value.runtime
    assert runtime is not None
    await _owe_thaw(context, begun[0])
    await resumed_as(env, vm_id, machine, runtime, Identity(id=vm_id, parent_id=begun[0].vm_id))
    await machine.pause()
    seen = await machine.observe()
    await set_state(env, vm_id, lambda o: replace(moved(env, o, VmState.PAUSED, "it stands by"), agent=seen.agent))


async def run(context: Context) -> None:
    machine = await launched(context)
    paused = bool(context.operation.params.get("paused", False))
    begun = await _origin(context, SnapshotState.SAVING)
    if begun is not None:
        await _wake(context, machine, *begun)
    elif not paused:
        await machine.resume()
    seen = await machine.observe()
    state = VmState.PAUSED if paused else VmState.RUNNING
    await set_state(context.env, context.vm_id, lambda o: replace(moved(context.env, o, state), agent=seen.agent))


async def resumed_as(env: Env, vm_id: str, machine: StatefulMachine, runtime: VmRuntime, who: Identity) -> Report:
    """Let a machine that has its state go on, and become ``who`` at once. Raises what either does."""
    try:
        async with asyncio.TaskGroup() as group:
            # The question waits in the guest's port when the vCPUs begin to run.
            asking = group.create_task(env.identities.first(vm_id, runtime, who))
            await machine.resume()
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return asking.result()


async def _owe_thaw(context: Context, snapshot: Snapshot) -> None:
    """Its memory may be that of a guest whose file systems are frozen: whoever lets it go on is to thaw them."""
    if snapshot.quiesced:
        await context.env.records.statuses.update(context.vm_id, lambda s: replace(s, frozen=context.operation.id))


async def _wake(context: Context, machine: StatefulMachine, snapshot: Snapshot, origin: Origin) -> None:
    """Bring the machine to the state that it begins at, and let it go on as itself: nobody sees it as another."""
    env, vm_id = context.env, context.vm_id
    if (await machine.observe()).run is RunState.PRELAUNCH:  # else this is repeated, and it has its state
        await machine.load(origin)
    runtime = (await env.records.statuses.need(vm_id)).value.runtime
    assert runtime is not None
    spec = _spec(context)
    old, new = ({n.name: n.mac for n in s.nics} for s in (snapshot.spec, spec))
    who = Identity(
        id=vm_id,
        parent_id=snapshot.vm_id,
        hostname=spec.hostname if snapshot.vm_id != vm_id else "",
        macs={mac: new[name] for name, mac in old.items() if name in new and new[name] != mac},
    )
    await _owe_thaw(context, snapshot)
    report = await resumed_as(env, vm_id, machine, runtime, who)
    await machine.join(runtime.nics)
    copied = snapshot.vm_id != vm_id
    await env.records.statuses.update(vm_id, lambda s: replace(s, identity=report, becoming=who if copied else None))
    if not context.operation.params.get("paused", False):
        await let_go(env, vm_id)


START: tuple[Step, ...] = (
    Step("begin", begin, undo_begin, words="preparing the start"),
    Step("prepare", prepare, undo_prepare, words="preparing its disks"),
    Step("slice", make_slice, undo_slice, words="making its control group"),
    Step("network", attach_networks, undo_networks, words="connecting its network"),
    Step("launch", launch, undo_launch, words="launching QEMU"),
    Step("run", run, words="letting its vCPUs go"),
)
HOLD: tuple[Step, ...] = (*START[:-1], Step("hold", hold, cancellable=False, words="bringing its memory in"))
