"""The simulated host itself: what outlives a daemon. :mod:`mica.testing.simulated` says how it is used."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mica.model.image import DirectBoot, DiskFormat, Image, ImageFile
from mica.model.snapshot import MachineBuild
from mica.model.units import GIB, MIB, Bytes
from mica.model.vm import AgentState, NicRuntime, ProcessRef
from mica.ports.clock import Clock
from mica.ports.host import Capacity
from mica.ports.hypervisor import EventKind, Exit, LaunchPlan, MachineEvent, RunState
from mica.ports.slices import SliceLimits
from mica.ports.volumes import Volume
from mica.testing.simulated_faults import Faults
from mica.testing.simulated_files import Moment, SimulatedFiles

# An event only means "look again", so of very many the oldest may go.
_EVENTS_KEPT = 256


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """How a guest behaves. Times are seconds of the clock from the first moment its vCPUs run; ``None`` is never.

    ``agent_after_s``: it opens the agent's port. ``hears_after_s``: it has booted so far that a request to power off is
    not lost. ``obeys_after_s``: it has powered off, counted from the first request that it heard.
    ``power_off_after_s``: it powers off by itself. ``killed_after_s``: its QEMU is killed. ``cpu`` is its use of
    processors, ``touched`` the share of its RAM that it has written to, ``changes`` bytes of it since it became a
    private child, and ``word`` bytes for each word that it writes. ``writes``: each time its vCPUs are let go it writes
    a word of its own to its memory and to each disk.
    """

    agent_after_s: float | None = 1.0
    hears_after_s: float | None = 0.0
    obeys_after_s: float | None = 2.0
    power_off_after_s: float | None = None
    killed_after_s: float | None = None
    cpu: float = 0.02
    touched: float = 0.5
    changes: int = MIB
    word: int = 0
    writes: bool = False


class SimulatedProcess:
    """A QEMU with its guest."""

    def __init__(self, world: SimulatedHost, plan: LaunchPlan, ref: ProcessRef, behaviour: Behaviour) -> None:
        self.world = world
        self.plan = plan
        self.ref = ref
        self.behaviour = behaviour
        self.run = RunState.PRELAUNCH
        self.reason = ""
        self.agent = AgentState.WAITING if plan.vm.spec.agent else AgentState.ABSENT
        self.exit: Exit | None = None
        self.started_at = world.clock.monotonic()
        self.applied = plan.vm.spec
        self.asked = 0
        self.waits = plan.origin is not None
        self.joined = plan.origin is None
        self.memory: list[str] = []
        # What it must find when its vCPUs are let go for the first time: that of the state that it was brought to.
        self.due: Moment | None = None
        self.frozen = False
        # The files that it has open.
        self.disks = {volume.name: volume.path for volume in plan.volumes}
        self.gone = asyncio.Event()
        self._runs = asyncio.Event()
        self._booted = False
        self._hears = behaviour.hears_after_s == 0
        self._obeys = False
        self._listeners: list[Feed] = []

    @property
    def vm_id(self) -> str:
        return self.plan.vm.id

    @property
    def touched(self) -> int:
        """Bytes of its RAM, where that is its own."""
        return int(self.plan.vm.spec.memory * self.behaviour.touched)

    @property
    def own(self) -> int:
        """Bytes that its process has for itself beside its RAM: QEMU's, and changed pages of RAM that it shares."""
        return 32 * MIB + (0 if self.plan.origin is None else self.behaviour.changes)

    def listen(self) -> Feed:
        feed = Feed()
        if self.exit is not None:
            feed.put(MachineEvent(EventKind.EXITED))
        self._listeners.append(feed)
        return feed

    def tell(self, kind: EventKind, detail: str = "") -> None:
        for feed in self._listeners:
            feed.put(MachineEvent(kind, detail))

    def moment(self) -> Moment:
        """What it has in memory and on its disks now. Raises :class:`KeyError` when a part below a disk is gone."""
        return Moment(tuple(self.memory), {name: self.world.storage.read(path) for name, path in self.disks.items()})

    def _check_due(self) -> None:
        try:
            found = self.moment()
        except KeyError as gone:
            self.world.violations.append(f"VM {self.plan.vm.name} runs on disks of which {gone} is gone")
            return
        if self.due is not None and found != self.due:
            self.world.violations.append(f"VM {self.plan.vm.name} begins with {found}, not with {self.due}")
        self.due = None

    def write(self, token: str) -> None:
        """The guest writes a word to its memory and to each disk that it may write to."""
        self.memory.append(token)
        read_only = {disk.name for disk in self.plan.vm.spec.disks if disk.read_only}
        for name, path in self.disks.items():
            if name in read_only:
                continue
            file = self.world.storage.there.get(path)
            if file is None or file.read_only:
                what = "that is gone" if file is None else "that never changes"
                self.world.violations.append(f"VM {self.plan.vm.name} writes to {path}, a file {what}")
            else:
                file.write(token)

    def resume(self) -> None:
        self._check_due()
        self.run, self.reason = RunState.RUNNING, ""
        if self.behaviour.writes:
            self.write(self.world.next_word(self.plan.vm.name))
        self._runs.set()
        self.tell(EventKind.RESUMED)
        if not self._booted:
            self._booted = True
            self._later(self.behaviour.agent_after_s, self.open_agent)
            self._later(None if self._hears else self.behaviour.hears_after_s, self._hear)
            self._later(self.behaviour.power_off_after_s, self.power_off)
            self._later(self.behaviour.killed_after_s, self.kill)

    def pause(self, reason: str = "", kind: EventKind = EventKind.PAUSED) -> None:
        """``reason`` when QEMU pauses by itself, after an I/O error for instance."""
        self.run, self.reason = RunState.PAUSED, reason
        self._runs.clear()
        self.tell(kind, reason)

    def ask(self) -> None:
        """The power button, or the agent's shutdown: a guest that does not run, or that boots, does not hear it."""
        self.asked += 1
        if self.run is RunState.RUNNING and self._hears and not self._obeys:
            self._obeys = True
            self._later(self.behaviour.obeys_after_s, self.power_off)

    def _hear(self) -> None:
        self._hears = True

    def open_agent(self) -> None:
        if self.agent is AgentState.WAITING:
            self.agent = AgentState.READY
            self.tell(EventKind.AGENT, "opened")

    def close_agent(self) -> None:
        if self.agent is AgentState.READY:
            self.agent = AgentState.WAITING
            self.tell(EventKind.AGENT, "closed")

    def power_off(self) -> None:
        """The guest powers off, and QEMU ends in order."""
        self.run = RunState.SHUTDOWN
        self.tell(EventKind.SHUTDOWN, "guest-shutdown")
        self._end(Exit(clean=True))

    def kill(self, last_words: str = "terminated by signal 9") -> None:
        """QEMU dies, and not in order."""
        self._end(Exit(clean=False, last_words=last_words))

    def quit(self) -> None:
        """QEMU ends because it was told to."""
        self._end(Exit(clean=True))

    def _end(self, gone: Exit) -> None:
        if self.exit is not None:
            return
        self.exit = gone
        self.world.ended(self)
        self.gone.set()
        self.tell(EventKind.EXITED)

    def _later(self, seconds: float | None, action: Callable[[], None]) -> None:
        if seconds is not None:
            self.world.spawn(self._act_later(seconds, action))

    async def _act_later(self, seconds: float, action: Callable[[], None]) -> None:
        await self.world.clock.sleep(seconds)
        if self.exit is None:
            await self._runs.wait()
        if self.exit is None:
            action()


class Feed:
    """Events for one reader. An iterator that ends after ``exited``."""

    def __init__(self) -> None:
        self._events: list[MachineEvent] = []
        self._news = asyncio.Event()
        self._over = False

    def put(self, event: MachineEvent) -> None:
        self._events = [*self._events[1 - _EVENTS_KEPT :], event]
        self._news.set()

    def __aiter__(self) -> Feed:
        return self

    async def __anext__(self) -> MachineEvent:
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        event = self._events.pop(0)
        self._over = event.kind is EventKind.EXITED
        return event


class SimulatedHost:
    """The world. Its attributes may be read and changed by a test as it likes.

    Close it (or use it as an asynchronous context manager): guests are tasks.
    """

    def __init__(self, clock: Clock, *, cpus: int = 4, memory: int = 8 * GIB, host_used: int = GIB) -> None:
        self.clock = clock
        self.faults = Faults(clock)
        self.cpus = cpus
        self.memory = memory
        self.host_used = host_used
        self.disk_free = 100 * GIB
        self.build_s = 0.0
        self.default = Behaviour()
        self.behaviours: dict[str, Behaviour] = {}
        self.boots = 1
        # What states of machines fit, of this host's QEMU as it is now.
        self.build = MachineBuild(qemu="simulated", machine="pc-simulated", cpu="simulated", accelerator="simulated")
        self.processes: dict[str, SimulatedProcess] = {}
        # Second machines of VMs that are about to go on as children of their frozen memory.
        self.spares: dict[str, SimulatedProcess] = {}
        # Words in frozen memory: the very list of the machine whose memory it was, which may write until it ends.
        self.ram_images: dict[str, list[str]] = {}
        # Copies that are to become such, and are not the memory of any moment yet.
        self.ram_copies: dict[str, list[str]] = {}
        # What each takes in memory, and whose it was: while that lives, it is its memory.
        self.ram_sizes: dict[str, tuple[int, SimulatedProcess | None]] = {}
        # What no machine may ever do or find, and one did.
        self.violations: list[str] = []
        self.remains: dict[str, tuple[ProcessRef, Exit]] = {}
        self.logs: set[str] = set()
        self.volumes: dict[str, dict[str, Volume]] = {}
        self.storage = SimulatedFiles()
        self.unclean: set[str] = set()
        self.checked: list[str] = []
        self.networks: dict[tuple[str, str], NicRuntime] = {}
        self.slices: dict[str, SliceLimits] = {}
        self.oom_kills: dict[str, int] = {}
        self.images: dict[str, Image] = {}
        self.damaged: set[str] = set()
        self.files: set[Path] = set()
        self.connections: set[str] = set()
        self.ports_told: list[bool] = []
        self._pids = 1000
        self._words = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> SimulatedHost:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the guests' tasks. The world stays readable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Any) -> None:
        """A task of the world, which no daemon owns."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── what a test does to it ────────────────────────────────────────────────────────────────────────────────────

    def process(self, vm: str) -> SimulatedProcess:
        """The live process of a VM, by id or name. Raises :class:`KeyError`."""
        found = self.processes.get(vm) or next((p for p in self.processes.values() if p.plan.vm.name == vm), None)
        if found is None:
            raise KeyError(f"no process of VM {vm}")
        return found

    def behave(self, name: str, behaviour: Behaviour) -> None:
        """How the guest of the VM called ``name`` behaves from its next start."""
        self.behaviours[name] = behaviour

    def reboot(self) -> None:
        """The host restarts: what lives in processes or in memory is gone, disks stay."""
        for process in self.living():
            process.kill("the host went down")
        self.remains.clear()
        self.ram_images.clear()
        self.ram_copies.clear()
        self.networks.clear()
        self.slices.clear()
        self.connections.clear()
        self.boots += 1

    def add_image(self, name: str = "micro", *, disk_size: int = 0, min_memory: int = 64 * MIB, n: int = 0) -> Image:
        """Put an image on the host, without a row in any store. ``n`` makes another content of the same name."""
        image = make_image(name, disk_size=disk_size, min_memory=min_memory, created_at=self.clock.now(), n=n)
        self.images[image.digest] = image
        return image

    def write(self, vm_id: str, disk: str, token: str) -> None:
        """The guest writes to its disk: to the file that its process has open, or, where there is none, to the volume.

        Raises :class:`KeyError` when that file is gone, :class:`AssertionError` when it is a part.
        """
        process = self.processes.get(vm_id)
        path = process.disks[disk] if process else self.volumes[vm_id][disk].path
        self.storage.there[path].write(token)

    def content(self, vm_id: str, disk: str) -> tuple[str, ...]:
        """All that was written to a disk, through its layers, oldest first."""
        return self.storage.read(self.volumes[vm_id][disk].path)

    # ── what the fakes use ────────────────────────────────────────────────────────────────────────────────────────

    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def next_process(self) -> ProcessRef:
        self._pids += 1
        return ProcessRef(self._pids, self._pids * 100, self.boot_id())

    def next_word(self, who: str) -> str:
        self._words += 1
        return f"{who}-{self._words}"

    def mapped(self, ram_id: str) -> bool:
        """Whether a machine lies over that image, by which it is found again."""
        return any(p.plan.origin is not None and p.plan.origin.ram == ram_id for p in self.living())

    def ended(self, process: SimulatedProcess) -> None:
        """A process ended; where it was a VM's, its spare is now."""
        assert process.exit is not None
        if self.spares.get(process.vm_id) is process:
            del self.spares[process.vm_id]
            return
        del self.processes[process.vm_id]
        spare = self.spares.pop(process.vm_id, None)
        if spare is not None:
            self.processes[process.vm_id] = spare
        else:
            self.remains[process.vm_id] = (process.ref, process.exit)

    def living(self) -> list[SimulatedProcess]:
        return [*self.processes.values(), *self.spares.values()]

    def touched(self, vm_id: str) -> int:
        """Memory that a VM's process has taken so far, in bytes."""
        process = self.processes.get(vm_id)
        if process is None:
            return 0
        return process.own + (process.touched if process.plan.origin is None else 0)

    def shared(self) -> int:
        """What RAM images take in memory that are no living machine's own."""
        living = self.living()
        return sum(self.ram_sizes[id_][0] for id_ in self.ram_images if self.ram_sizes[id_][1] not in living)

    def capacity(self) -> Capacity:
        used = sum(self.touched(vm_id) for vm_id in self.processes) + self.shared()
        return Capacity(
            cpus=self.cpus,
            memory=Bytes(self.memory),
            available=Bytes(max(0, self.memory - self.host_used - used)),
            disk_free=Bytes(self.disk_free),
        )

    def holdings(self) -> dict[str, Any]:
        """Everything that anybody may leave behind here, comparable."""
        return {
            "processes": sorted(self.processes),
            "spares": sorted(self.spares),
            "logs": sorted(self.logs),
            "volumes": {vm_id: sorted(disks) for vm_id, disks in sorted(self.volumes.items())},
            "staged": {vm_id: sorted(disks) for vm_id, disks in sorted(self.storage.staged.items())},
            "parts": sorted(self.storage.parts),
            "scratch": sorted(self.storage.scratch),
            "networks": sorted(self.networks),
            "slices": sorted(self.slices),
            "images": sorted(self.images),
            "connections": sorted(self.connections),
        }


def make_image(
    name: str, *, disk_size: int = 0, min_memory: int = 64 * MIB, created_at: float = 0.0, n: int = 0
) -> Image:
    """An image of no real bytes; the same arguments give the same digest, whenever it is made."""
    digest = "blake3:" + hashlib.sha256(f"{name}/{disk_size}/{min_memory}/{n}".encode()).hexdigest()
    kernel = ImageFile(Bytes(8 * MIB), "0" * 64)
    files = {"kernel": kernel, "initrd": kernel} if not disk_size else {"disk.qcow2": kernel}
    return Image(
        digest=digest,
        name=name,
        os=name,
        created_at=created_at,
        files=files,
        disk="disk.qcow2" if disk_size else None,
        disk_format=DiskFormat.QCOW2,
        disk_size=Bytes(disk_size),
        direct_boot=None if disk_size else DirectBoot("kernel", "initrd", "console=ttyS0"),
        min_memory=Bytes(min_memory),
        agent=True,
    )
