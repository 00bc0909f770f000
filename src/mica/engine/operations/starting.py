"""The steps that bring a VM up, shared by every verb that does."""

from __future__ import annotations

from typing import Any

import msgspec

from mica.engine.admission import admit
from mica.engine.definition import Context, Proposal, Step
from mica.engine.records import Ledger, Reservation
from mica.engine.settle import moved, set_state, stopped, take_down
from mica.model.errors import Code, MicaError
from mica.model.image import Image
from mica.model.units import Bytes
from mica.model.vm import NicRuntime, Vm, VmRuntime, VmSpec, VmState
from mica.ports.hypervisor import LaunchPlan
from mica.ports.slices import SliceLimits
from mica.ports.volumes import Volume

replace = msgspec.structs.replace


def slice_limits(spec: VmSpec, overhead: int) -> SliceLimits:
    """What the VM's control group enforces: its vCPUs' worth of processor, its RAM and QEMU's own memory."""
    # QEMU's own threads (devices, block layer) share the group with the vCPUs; half a processor keeps them alive.
    cpus = spec.cpu_limit if spec.cpu_limit is not None else spec.cpus + 0.5
    return SliceLimits(cpus, Bytes(spec.memory + 2 * overhead))


async def reserve(proposal: Proposal, vm: Vm, *, overcommit: bool) -> None:
    """Admission: promise the memory within the accepting transaction, or raise with numbers and ways out."""
    env = proposal.env
    await env.hypervisor.check(vm.spec)
    ledger = await env.records.read_ledger()
    need = Reservation(vm.spec.memory, env.hypervisor.overhead(vm.spec))
    if vm.id not in ledger.value.reserved:
        running = env.sampler.candidates(ledger.value)
        admit(
            vm.name,
            vm.spec,
            need,
            env.host.capacity(),
            ledger.value,
            running,
            reserve=env.policy.reserve,
            overcommit=overcommit,
        )
    new = Ledger({**ledger.value.reserved, vm.id: need})
    proposal.draft.put(env.records.ledger, "memory", new, ledger.generation)


async def _vm(context: Context) -> Vm:
    return (await context.env.records.vms.need(context.vm_id)).value


async def _image(context: Context, vm: Vm) -> Image | None:
    if vm.spec.image is None:
        return None
    return (await context.env.records.images.need(vm.spec.image)).value.image


async def begin(context: Context) -> None:
    await set_state(context.env, context.vm_id, lambda o: moved(context.env, o, VmState.STARTING))


async def undo_begin(context: Context) -> None:
    status = await context.env.records.statuses.get(context.vm_id)
    if status is not None and status.value.observed.state is VmState.STARTING:
        await stopped(context.env, context.vm_id, VmState.STOPPED, "it could not be started", context.failure)
    await context.env.records.release(context.vm_id)


async def prepare(context: Context) -> list[Volume]:
    vm = await _vm(context)
    owner = context.env.policy.owner(vm.slot)
    volumes = list(await context.env.volumes.prepare(vm.id, vm.spec.disks, owner))
    nvram = await context.env.volumes.nvram(vm.id, vm.spec.firmware, owner)
    return [*volumes, nvram] if nvram else volumes


async def undo_prepare(context: Context) -> None:
    await context.env.volumes.settled(context.vm_id)


async def make_slice(context: Context) -> dict[str, Any]:
    vm = await _vm(context)
    limits = slice_limits(vm.spec, context.env.hypervisor.overhead(vm.spec))
    return await context.env.slices.create(vm.id, limits)


async def undo_slice(context: Context) -> None:
    vm = await _vm(context)
    handle = context.outputs.get("slice")
    if handle is None:
        # ``create`` is idempotent, so its handle can be had again whatever it had got to.
        handle = await context.env.slices.create(vm.id, slice_limits(vm.spec, 0))
    await context.env.slices.remove(handle)


async def attach_networks(context: Context) -> list[NicRuntime]:
    vm = await _vm(context)
    return [await context.env.networks.attach(vm, nic.name) for nic in vm.spec.nics]


async def undo_networks(context: Context) -> None:
    vm = await _vm(context)
    done = msgspec.convert(context.outputs.get("network", []), list[NicRuntime])
    for nic in vm.spec.nics:
        known = next((n for n in done if n.name == nic.name), NicRuntime(name=nic.name))
        await context.env.networks.detach(vm.id, known)


async def launch(context: Context) -> VmRuntime:
    vm = await _vm(context)
    image = await _image(context, vm)
    direct = image.direct_boot if image and image.disk is None else None
    files = context.env.images
    plan = LaunchPlan(
        vm=vm,
        volumes=tuple(context.output("prepare", list[Volume])),
        nics=tuple(context.output("network", list[NicRuntime])),
        slice=context.outputs["slice"],
        read_only_paths=(files.path(image, "").parent,) if image and direct is None else (),
        direct_boot=direct,
        kernel=files.path(image, direct.kernel) if image and direct else None,
        initrd=files.path(image, direct.initrd) if image and direct else None,
    )
    runtime = await context.env.hypervisor.launch(plan)
    await context.env.records.statuses.update(
        vm.id,
        lambda s: replace(s, runtime=runtime, observed=replace(s.observed, started_at=runtime.started_at)),
    )
    return runtime


async def undo_launch(context: Context) -> None:
    await take_down(context.env, context.vm_id, clean=False)
    await context.env.records.statuses.update(context.vm_id, lambda s: replace(s, runtime=None))


async def run(context: Context) -> None:
    machine = await context.env.machines.attach(context.vm_id)
    if machine is None:
        words = (await context.env.hypervisor.autopsy(context.output("launch", VmRuntime))).last_words
        raise MicaError(Code.QEMU_FAILED, f"QEMU ended before the guest ran{': ' + words if words else ''}")
    paused = bool(context.operation.params.get("paused", False))
    if not paused:
        await machine.resume()
    seen = await machine.observe()
    state = VmState.PAUSED if paused else VmState.RUNNING
    await set_state(context.env, context.vm_id, lambda o: replace(moved(context.env, o, state), agent=seen.agent))


START: tuple[Step, ...] = (
    Step("begin", begin, undo_begin),
    Step("prepare", prepare, undo_prepare),
    Step("slice", make_slice, undo_slice),
    Step("network", attach_networks, undo_networks),
    Step("launch", launch, undo_launch),
    Step("run", run),
)
