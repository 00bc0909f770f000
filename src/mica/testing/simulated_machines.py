"""Simulated machines and what is inside them: :class:`SimulatedHypervisor`, :class:`SimulatedGuests`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.snapshot import MachineBuild
from mica.model.units import MIB, Bytes
from mica.model.vm import AgentState, NicRuntime, VmRuntime, VmSpec
from mica.ports.guests import GuestFacts
from mica.ports.hypervisor import Captured, Exit, Forecast, LaunchPlan, MachineStatus, Origin, RunState
from mica.ports.volumes import Volume
from mica.testing.simulated_files import PARTS
from mica.testing.simulated_world import Behaviour, Feed, SimulatedHost, SimulatedProcess

MAX_CPUS = 64


class SimulatedMachine:
    """:class:`mica.ports.hypervisor.StatefulMachine` on a process of the world.

    The memory of a guest is a list of words that were written to it. A state is a file in the world's, whose content
    are the words.
    """

    def __init__(self, process: SimulatedProcess) -> None:
        self.process = process
        self._faults = process.world.faults

    async def observe(self) -> MachineStatus:
        async with self._faults.around("machine.observe"):
            self._check_alive()
            return MachineStatus(self.process.run, self.process.agent, self.process.reason)

    async def resume(self) -> None:
        async with self._faults.around("machine.resume"):
            self._check_alive()
            if self.process.waits:
                raise MicaError(Code.QEMU_FAILED, "the machine waits for its state")
            self.process.resume()

    async def pause(self) -> None:
        async with self._faults.around("machine.pause"):
            self._check_alive()
            self.process.pause()

    async def power_button(self) -> None:
        async with self._faults.around("machine.power_button"):
            self._check_alive()
            self.process.ask()

    async def kill(self) -> None:
        async with self._faults.around("machine.kill"):
            self.process.kill()

    async def apply(self, spec: VmSpec) -> None:
        async with self._faults.around("machine.apply"):
            self._check_alive()
            self.process.applied = spec

    async def capture(self, into: Path, *, folded: bool = False) -> Captured:
        async with self._faults.around("machine.capture"):
            self._check_alive()
            if self.process.run is RunState.RUNNING:
                raise MicaError(Code.STATE_CONFLICT, "a machine that runs cannot be captured")
            world, own = self.process.world, self.process.plan.origin is None or folded
            # A guest's file systems are as frozen in its copies as in itself.
            world.storage.put(into / "devices", ["devices", *(["frozen"] if self.process.frozen else [])])
            world.storage.there[into / "devices"].moment = self.process.moment()
            if own:
                return Captured(devices=into / "devices", build=world.build)
            world.storage.put(into / "changes", self.process.memory)
            return Captured(
                devices=into / "devices", changes=into / "changes", build=world.build, changed=self._changed()
            )

    async def forecast(self) -> Forecast:
        async with self._faults.around("machine.forecast"):
            self._check_alive()
            process = self.process
            ram = int(process.plan.vm.spec.memory * process.behaviour.touched)
            return Forecast(ram=Bytes(ram), changed=self._changed())

    def _changed(self) -> Bytes:
        """Since it became a child of its image: more with every word."""
        process, origin = self.process, self.process.plan.origin
        if origin is None:
            return Bytes(0)
        words = len(process.memory) - len(process.world.ram_images.get(origin.ram, ()))
        return Bytes(process.behaviour.changes + process.behaviour.word * max(0, words))

    async def load(self, origin: Origin) -> None:
        async with self._faults.around("machine.load"):
            self._check_alive()
            world, process = self.process.world, self.process
            if not process.waits:
                raise MicaError(Code.QEMU_FAILED, "the machine has its state already")
            there = world.storage.there
            if origin.devices not in there or (origin.changes and origin.changes not in there):
                raise MicaError(Code.CORRUPT, f"there is no state at {origin.devices}")
            source = there[origin.changes].tokens if origin.changes else world.ram_images[origin.ram]
            process.memory = list(source)
            process.due = there[origin.devices].moment
            process.frozen = "frozen" in there[origin.devices].tokens
            process.run, process.waits, process.agent = RunState.PAUSED, False, AgentState.READY

    async def join(self, nics: tuple[NicRuntime, ...]) -> None:
        async with self._faults.around("machine.join"):
            self._check_alive()
            if any(self.process.world.networks.get((self.process.vm_id, nic.name)) != nic for nic in nics):
                raise MicaError(Code.QEMU_FAILED, "Could not connect the NICs")
            self.process.joined = True

    async def switch(self, volumes: tuple[Volume, ...]) -> None:
        async with self._faults.around("machine.switch"):
            self._check_alive()
            if all(self.process.disks.get(v.name) == v.path for v in volumes):
                return  # they moved already
            if self.process.run is RunState.RUNNING:
                raise MicaError(Code.STATE_CONFLICT, "disks move while the machine is paused")
            if missing := [v.name for v in volumes if v.path not in self.process.world.storage.there]:
                raise MicaError(Code.QEMU_FAILED, f"Could not open disks {missing}")
            self.process.disks |= {v.name: v.path for v in volumes}

    def events(self) -> Feed:
        return self.process.listen()

    async def ended(self) -> Exit:
        async with self._faults.around("machine.ended"):
            await self.process.gone.wait()
            assert self.process.exit is not None
            return self.process.exit

    def _check_alive(self) -> None:
        if self.process.exit is not None:
            raise MicaError(Code.QEMU_FAILED, f"QEMU of VM {self.process.plan.vm.name} closed its monitor")


class SimulatedRamImages:
    """:class:`mica.ports.ram.RamImages` as one daemon sees them."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._faults = world.faults
        self._held: dict[str, None] = {}
        # Memory that no machine has went with the daemon that held it.
        for images in (world.ram_images, world.ram_copies):
            for ram_id in [id_ for id_ in images if not world.mapped(id_)]:
                del images[ram_id]
        self._making: set[str] = set()

    async def hold(self, runtime: VmRuntime, ram_id: str) -> None:
        async with self._faults.around("ram.hold"):
            if ram_id in self._held:
                return
            process = self._process(runtime)
            self._world.ram_images[ram_id] = process.memory
            self._world.ram_sizes[ram_id] = (process.touched, process)
            self._held[ram_id] = None

    def learn(self, runtime: VmRuntime) -> None:
        if runtime.ram in self._world.ram_images and any(p.ref == runtime.process for p in self._world.living()):
            self._held[runtime.ram] = None

    async def prepare(self, runtime: VmRuntime, ram_id: str, report: Callable[[float], None]) -> None:
        async with self._faults.around("ram.prepare"):
            if ram_id in self._making or ram_id in self._held:
                return
            process = self._process(runtime)
            assert process.plan.origin is not None
            # The memory at no moment at all: that of the image, and what has changed so far.
            self._world.ram_copies[ram_id] = [*process.memory, "torn"]
            self._making.add(ram_id)
            report(1.0)

    async def fill(self, runtime: VmRuntime, waiting: VmRuntime) -> None:
        async with self._faults.around("ram.fill"):
            if waiting.ram in self._held:
                return
            process, second = self._process(runtime), self._process(waiting)
            if process.run is RunState.RUNNING:
                raise MicaError(Code.STATE_CONFLICT, "memory that is being written cannot be an image")
            assert second.plan.origin is not None
            if waiting.ram not in self._world.ram_images:
                del self._world.ram_copies[waiting.ram]
                self._world.ram_images[waiting.ram] = list(process.memory)
                self._world.ram_sizes[waiting.ram] = (process.touched, None)
            self._held[waiting.ram] = None
            self._making.discard(waiting.ram)

    def discard(self, ram_id: str) -> None:
        self._making.discard(ram_id)
        if not self._world.mapped(ram_id):
            self._world.ram_copies.pop(ram_id, None)

    def _process(self, runtime: VmRuntime) -> SimulatedProcess:
        process = next((p for p in self._world.living() if p.ref == runtime.process), None)
        if process is None:
            raise MicaError(Code.QEMU_FAILED, "the machine has ended, and its memory with it")
        return process

    def need(self, origin: Origin) -> None:
        """As a memfd is found: made or held by this daemon, or read from the file."""
        if origin.ram in self._making:
            return
        if origin.ram not in self._held:
            if origin.ram_file not in self._world.storage.there:
                raise not_found("RAM image", origin.ram)
            self._world.ram_images[origin.ram] = list(self._world.storage.there[origin.ram_file].tokens)
            self._world.ram_sizes.setdefault(origin.ram, (0, None))
        self._held.pop(origin.ram, None)
        self._held[origin.ram] = None

    async def save(self, ram_id: str, file: Path, report: Callable[[float], None]) -> None:
        async with self._faults.around("ram.save"):
            if ram_id not in self._held:
                raise not_found("RAM image", ram_id)
            self._world.storage.put(file, self._world.ram_images[ram_id])
            report(1.0)

    def held(self) -> list[str]:
        return list(self._held)

    def size(self, ram_id: str) -> Bytes:
        return Bytes(self._world.ram_sizes[ram_id][0] if ram_id in self._held else 0)

    def release(self, ram_id: str) -> None:
        self._held.pop(ram_id, None)
        if not self._world.mapped(ram_id):
            self._world.ram_images.pop(ram_id, None)


class SimulatedHypervisor:
    """:class:`mica.ports.hypervisor.Hypervisor` on a simulated host."""

    def __init__(self, world: SimulatedHost, images: SimulatedRamImages | None = None) -> None:
        self._world = world
        self._faults = world.faults
        self._images = images or SimulatedRamImages(world)

    def overhead(self, spec: VmSpec) -> Bytes:
        return Bytes((64 + 8 * spec.cpus) * MIB)

    async def check(self, spec: VmSpec) -> None:
        async with self._faults.around("hypervisor.check"):
            if spec.cpus > MAX_CPUS:
                raise invalid(f"{spec.cpus} vCPUs; this machine type has at most {MAX_CPUS}")

    async def launch(self, plan: LaunchPlan) -> VmRuntime:
        async with self._faults.around("hypervisor.launch"):
            world, vm = self._world, plan.vm
            for earlier in world.living():
                if earlier.vm_id == vm.id and earlier.plan.incarnation == plan.incarnation:
                    earlier.kill("a new launch replaced it")
            self._check_plan(plan)
            if plan.origin is not None:
                self._images.need(plan.origin)
            world.remains.pop(vm.id, None)
            world.logs.add(vm.id)
            ref = world.next_process()
            behaviour: Behaviour = world.behaviours.get(vm.name, world.default)
            made = SimulatedProcess(world, plan, ref, behaviour)
            (world.spares if vm.id in world.processes else world.processes)[vm.id] = made
            return VmRuntime(
                process=ref,
                spec=vm.spec,
                run_dir=f"/simulated/run/{vm.id}",
                accelerator="simulated",
                started_at=world.clock.now(),
                overhead=self.overhead(vm.spec),
                nics=plan.nics,
                slice=plan.slice,
                ram=plan.origin.ram if plan.origin else "",
                incarnation=plan.incarnation,
            )

    def _check_plan(self, plan: LaunchPlan) -> None:
        """As QEMU would refuse to start, so does this."""
        world, vm = self._world, plan.vm
        wanted = [d.name for d in vm.spec.disks]
        given = [v.name for v in plan.volumes if v.name != "nvram"]
        files = {v.path for v in plan.volumes} | {
            path for v in plan.volumes for path in v.backing if path.parent == PARTS
        }
        missing = sorted(str(path) for path in files - world.storage.there.keys())
        if missing or given != wanted:
            raise MicaError(Code.QEMU_FAILED, f"Could not open disks: wanted {wanted}, given {given}, no {missing}")
        nics = [n.name for n in plan.nics]
        if nics != [n.name for n in vm.spec.nics] or any(world.networks.get((vm.id, n.name)) != n for n in plan.nics):
            raise MicaError(Code.QEMU_FAILED, f"Could not connect the NICs: given {nics}")
        if plan.slice != {"id": vm.id} or vm.id not in world.slices:
            raise MicaError(Code.QEMU_FAILED, "Could not enter the control group")
        if world.slices[vm.id].memory is not None and (world.slices[vm.id].memory or 0) < vm.spec.memory:
            raise MicaError(Code.QEMU_FAILED, "Cannot allocate memory: the control group has less than the guest's RAM")
        for path in (plan.kernel, plan.initrd):
            if path is not None and not any(digest in str(path) for digest in world.images):
                raise MicaError(Code.QEMU_FAILED, f"could not load {path}")

    async def attach(self, runtime: VmRuntime) -> SimulatedMachine | None:
        async with self._faults.around("hypervisor.attach"):
            found = next((p for p in self._world.living() if p.ref == runtime.process), None)
            if found is not None:
                self._images.learn(runtime)
            return None if found is None else SimulatedMachine(found)

    def build_of(self, spec: VmSpec) -> MachineBuild:
        del spec
        return self._world.build

    async def build(self, runtime: VmRuntime) -> MachineBuild:
        del runtime
        return self._world.build

    async def retire(self, vm_id: str, incarnation: int) -> None:
        async with self._faults.around("hypervisor.retire"):
            for process in self._world.living():
                if process.vm_id == vm_id and process.plan.incarnation == incarnation:
                    process.kill("retired")
                    if self._world.processes.get(process.vm_id) is None:
                        self._world.remains.pop(process.vm_id, None)

    async def autopsy(self, runtime: VmRuntime) -> Exit:
        async with self._faults.around("hypervisor.autopsy"):
            for ref, gone in self._world.remains.values():
                if ref == runtime.process:
                    return gone
            return Exit(clean=False, last_words="the host was restarted meanwhile")

    async def cleanup(self, vm_id: str, runtime: VmRuntime | None) -> None:
        del runtime
        async with self._faults.around("hypervisor.cleanup"):
            for process in self._world.living():
                if process.vm_id == vm_id:
                    process.kill("cleaned up")
            self._world.remains.pop(vm_id, None)

    async def erase(self, vm_id: str) -> None:
        await self.cleanup(vm_id, None)
        async with self._faults.around("hypervisor.erase"):
            self._world.logs.discard(vm_id)

    async def leftovers(self, known: set[str]) -> list[str]:
        async with self._faults.around("hypervisor.leftovers"):
            return sorted({*self._world.processes, *self._world.remains, *self._world.logs} - known)


class SimulatedGuests:
    """:class:`mica.ports.guests.Guests` on a simulated host."""

    def __init__(self, world: SimulatedHost) -> None:
        self._world = world
        self._faults = world.faults

    def _process(self, vm_id: str) -> SimulatedProcess:
        process = self._world.processes.get(vm_id)
        if process is None or process.agent is not AgentState.READY or process.run is not RunState.RUNNING:
            raise MicaError(
                Code.AGENT_UNAVAILABLE, f"the guest agent of {vm_id[:8]} does not answer", hint="is it installed?"
            )
        return process

    async def facts(self, vm_id: str, runtime: VmRuntime) -> GuestFacts:
        async with self._faults.around("guests.facts"):
            process = self._process(vm_id)
            self._world.connections.add(vm_id)
            addresses = tuple(nic.address for nic in runtime.nics if nic.address)
            return GuestFacts(process.plan.vm.spec.hostname, "Simulated GNU/Linux 1", addresses)

    async def shutdown(self, vm_id: str, runtime: VmRuntime) -> None:
        del runtime
        async with self._faults.around("guests.shutdown"):
            process = self._process(vm_id)
            self._world.connections.add(vm_id)
            process.ask()

    async def freeze(self, vm_id: str, runtime: VmRuntime) -> int:
        del runtime
        async with self._faults.around("guests.freeze"):
            process = self._process(vm_id)
            self._world.connections.add(vm_id)
            process.frozen = True
            return len(process.plan.vm.spec.disks)

    async def thaw(self, vm_id: str, runtime: VmRuntime) -> None:
        del runtime
        async with self._faults.around("guests.thaw"):
            process = self._process(vm_id)
            self._world.connections.add(vm_id)
            process.frozen = False

    def port_changed(self, vm_id: str, runtime: VmRuntime, *, opened: bool) -> None:
        del runtime
        self._world.ports_told.append(opened)
        if not opened:
            self._world.connections.discard(vm_id)

    async def moved(self, vm_id: str, runtime: VmRuntime) -> None:
        del vm_id, runtime

    async def forget(self, vm_id: str) -> None:
        async with self._faults.around("guests.forget"):
            self._world.connections.discard(vm_id)

    async def erase(self, vm_id: str) -> None:
        await self.forget(vm_id)
