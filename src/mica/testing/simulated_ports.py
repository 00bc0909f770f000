"""Simulated networking, slices, images and host facts over a :class:`SimulatedHost`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mica.model.errors import Code, MicaError, not_found
from mica.model.image import DebianRecipe, Image, ImageRecipe, ImportRecipe
from mica.model.units import MIB, Bytes
from mica.model.vm import NetworkKind, NicRuntime, ProcessRef, Publish, Vm
from mica.ports.host import Capacity
from mica.ports.progress import Progress
from mica.ports.slices import SliceLimits, SliceUsage
from mica.testing.simulated_world import SimulatedHost, make_image

_STEPS = 4


class SimulatedNetworks:
    """:class:`mica.ports.networks.Networks`. Published ports are unique over the host."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._faults = world.faults

    async def attach(self, vm: Vm, nic: str) -> NicRuntime:
        async with self._faults.around("networks.attach"):
            spec = next(n for n in vm.spec.nics if n.name == nic)
            if spec.network == NetworkKind.NONE:
                runtime = NicRuntime(name=nic, handle={"vm": vm.id})
            else:
                publish = tuple(self._published(vm, nic, p) for p in spec.publish)
                address = f"10.{vm.slot // 256}.{vm.slot % 256}.2"
                runtime = NicRuntime(name=nic, address=address, publish=publish, handle={"vm": vm.id})
            self._world.networks[vm.id, nic] = runtime
            return runtime

    def _published(self, vm: Vm, nic: str, wish: Publish) -> Publish:
        taken = {
            (p.host_address, p.host_port, p.protocol)
            for key, held in self._world.networks.items()
            if key != (vm.id, nic)
            for p in held.publish
        }
        port = wish.host_port
        if not port:
            port = next(n for n in range(40000, 65536) if (wish.host_address, n, wish.protocol) not in taken)
        if (wish.host_address, port, wish.protocol) in taken:
            raise MicaError(
                Code.IN_USE, f"port {port} on {wish.host_address} is taken already", hint="publish on another port"
            )
        return msgspec.structs.replace(wish, host_port=port)

    async def detach(self, vm_id: str, nic: NicRuntime) -> None:
        async with self._faults.around("networks.detach"):
            self._world.networks.pop((vm_id, nic.name), None)

    async def remove(self, vm_id: str) -> None:
        async with self._faults.around("networks.remove"):
            for key in [key for key in self._world.networks if key[0] == vm_id]:
                del self._world.networks[key]

    async def owners(self) -> set[str]:
        async with self._faults.around("networks.owners"):
            return {vm_id for vm_id, _ in self._world.networks}

    async def healthy(self, nic: NicRuntime) -> bool:
        async with self._faults.around("networks.healthy"):
            return nic in self._world.networks.values()


class SimulatedSlices:
    """:class:`mica.ports.slices.Slices`; a slice with a process in it cannot be removed."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._faults = world.faults

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]:
        async with self._faults.around("slices.create"):
            self._world.slices[vm_id] = limits
            return {"id": vm_id}

    async def update(self, handle: dict[str, Any], limits: SliceLimits) -> None:
        async with self._faults.around("slices.update"):
            if handle["id"] not in self._world.slices:
                raise not_found("slice", handle["id"])
            self._world.slices[handle["id"]] = limits

    async def usage(self, handle: dict[str, Any], process: ProcessRef | None = None) -> SliceUsage:
        async with self._faults.around("slices.usage"):
            there = self._world.processes.get(handle["id"])
            if there is None or process not in (None, there.ref):
                raise not_found("slice", handle["id"])
            cpu_s = (self._world.clock.monotonic() - there.started_at) * there.behaviour.cpu
            memory = Bytes(self._world.touched(handle["id"]))
            return SliceUsage(cpu_s, memory, self._world.oom_kills.get(handle["id"], 0), own=Bytes(there.own))

    async def remove(self, handle: dict[str, Any]) -> None:
        async with self._faults.around("slices.remove"):
            if handle["id"] in self._world.processes:
                raise MicaError(Code.IN_USE, f"the control group of {handle['id'][:8]} has a process in it")
            self._world.slices.pop(handle["id"], None)

    def present(self) -> dict[str, dict[str, Any]]:
        return {vm_id: {"id": vm_id} for vm_id in self._world.slices}


class SimulatedImages:
    """:class:`mica.ports.images.Images`; the same recipe makes the same content, in ``world.build_s`` seconds."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._faults = world.faults

    async def make(self, recipe: ImageRecipe, progress: Progress) -> Image:
        async with self._faults.around("images.make"):
            if isinstance(recipe, ImportRecipe) and Path(recipe.path) not in self._world.files:
                raise not_found("file", recipe.path)
            for step in range(_STEPS):
                progress(step / _STEPS, f"building {recipe.name}")
                if self._world.build_s:
                    await self._world.clock.sleep(self._world.build_s / _STEPS)
            size = recipe.size if isinstance(recipe, DebianRecipe) else 0
            size = 512 * MIB if isinstance(recipe, ImportRecipe) else size
            image = make_image(recipe.name, disk_size=size, created_at=self._world.clock.now())
            return self._world.images.setdefault(image.digest, image)

    async def verify(self, image: Image, progress: Progress) -> None:
        async with self._faults.around("images.verify"):
            progress(0.5, "reading")
            if image.digest not in self._world.images:
                raise not_found("image", image.digest)
            if image.digest in self._world.damaged:
                raise MicaError(Code.CORRUPT, f"file kernel of image {image.name} is damaged")

    async def remove(self, digest: str) -> None:
        async with self._faults.around("images.remove"):
            self._world.images.pop(digest, None)
            self._world.damaged.discard(digest)

    async def present(self) -> list[Image]:
        async with self._faults.around("images.present"):
            return list(self._world.images.values())

    def path(self, image: Image, file: str) -> Path:
        return Path("/simulated/images") / image.digest / file


class SimulatedHostFacts:
    """:class:`mica.ports.host.Host`."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world

    def capacity(self) -> Capacity:
        self._world.faults.strike("host.capacity")
        return self._world.capacity()

    def boot_id(self) -> str:
        self._world.faults.strike("host.boot_id")
        return self._world.boot_id()
