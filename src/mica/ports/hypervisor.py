"""What the engine needs from a monitor of virtual machines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mica.model.image import DirectBoot
from mica.model.snapshot import MachineBuild
from mica.model.units import Bytes
from mica.model.vm import AgentState, NicRuntime, Vm, VmRuntime, VmSpec
from mica.ports.volumes import Volume


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """A state to begin at instead of at power-on.

    ``ram`` is the id of the RAM image, which is read from ``ram_file`` unless a machine or the adapter holds it.
    ``inside`` is that of :class:`mica.model.snapshot.MemoryState`.
    """

    ram: str
    ram_file: Path
    devices: Path
    build: MachineBuild
    changes: Path | None = None
    inside: int = 0


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """What :meth:`Machine.capture` wrote. ``changes`` is ``None`` when the RAM is the machine's own (``runtime.ram``
    is empty, or it was folded) and is yet to be held as an image. ``changed`` counts the bytes of changed pages."""

    devices: Path
    build: MachineBuild
    changes: Path | None = None
    changed: Bytes = Bytes(0)


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a capture now would come to. ``ram``: bytes of the RAM, or of the RAM image below it, that are more than
    holes. ``changed``: bytes of memory that would be written while the machine stands still."""

    ram: Bytes = Bytes(0)
    changed: Bytes = Bytes(0)


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a monitor needs to start a VM: values made by other adapters, no promises.

    ``kernel`` and ``initrd`` lie on this host, with ``direct_boot`` telling the command line. With ``origin`` the
    machine waits for ``load`` and its NICs for ``join``. ``incarnation`` is a number that no other living machine of
    the VM has. ``generation_id`` is a UUID that a guest sees change when its state was copied or went back (vmgenid);
    empty: the VM's own id.
    """

    vm: Vm
    volumes: tuple[Volume, ...]
    nics: tuple[NicRuntime, ...]
    slice: dict[str, Any]
    read_only_paths: tuple[Path, ...] = ()
    direct_boot: DirectBoot | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    origin: Origin | None = None
    incarnation: int = 0
    generation_id: str = ""


class RunState(StrEnum):
    """What the monitor says. ``paused`` covers every reason for which no vCPU runs; ``reason`` tells which."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    FAILED = "failed"


class MachineStatus(msgspec.Struct, frozen=True):
    """One look at a machine. ``reason`` is for people and empty when there is nothing to say."""

    run: RunState
    agent: AgentState
    reason: str = ""


class EventKind(StrEnum):
    RESUMED = "resumed"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    RESET = "reset"
    PANICKED = "panicked"
    IO_ERROR = "io-error"
    AGENT = "agent"
    EXITED = "exited"


class MachineEvent(msgspec.Struct, frozen=True):
    """Something happened; look again. ``detail`` is for people. The last event of a machine is ``exited``."""

    kind: EventKind
    detail: str = ""


class Exit(msgspec.Struct, frozen=True):
    """How a machine's process ended. ``clean``: it ended in order (the guest powered off, or it was asked to quit)."""

    clean: bool
    last_words: str = ""


class Usage(msgspec.Struct, frozen=True):
    """Real use on the host: processor seconds since start, memory in bytes (shared parts by their share)."""

    cpu_s: float
    memory: Bytes
    oom_kills: int = 0


class Machine(Protocol):
    """A live machine. Every method raises ``qemu-failed`` or ``timeout`` and leaves the machine as it was."""

    async def observe(self) -> MachineStatus: ...

    async def resume(self) -> None: ...

    async def pause(self) -> None: ...

    async def power_button(self) -> None:
        """Press it; whether the guest reacts is its own affair."""

    async def kill(self) -> None:
        """End the process now and wait until it is gone. A dead machine is not an error."""

    async def apply(self, spec: VmSpec) -> None:
        """Bring what can change at run time (disk limits) to what ``spec`` says."""

    def events(self) -> AsyncIterator[MachineEvent]:
        """Events from now on, for one reader, ending with ``exited``."""

    async def ended(self) -> Exit:
        """Wait until the process has ended."""


class StatefulMachine(Machine, Protocol):
    """What else a machine can do, for snapshots and forks."""

    async def capture(self, into: Path, *, folded: bool = False) -> Captured:
        """Write the state of a paused machine into files in the directory ``into``, overwriting earlier ones.

        ``folded``: its changed pages are in a RAM image of their own already, and are left out.

        Raises ``host-lacks`` naming a device that cannot be captured, ``state-conflict`` when vCPUs run.
        """

    async def forecast(self) -> Forecast:
        """What :meth:`capture` would come to now; the machine may run."""

    async def load(self, origin: Origin) -> None:
        """Bring a machine that was launched with an origin to that state; it is paused then. Once only.

        Raises ``corrupt``, ``qemu-failed``: end the machine then.
        """

    async def join(self, nics: tuple[NicRuntime, ...]) -> None:
        """Plug in the NICs of a machine that was launched with an origin. Idempotent."""

    async def switch(self, volumes: tuple[Volume, ...]) -> None:
        """Go on writing to these layers instead of the files below them, which are not written any more. The machine
        is paused. Idempotent."""


class Hypervisor(Protocol):
    """Starts machines and finds them again. Machines outlive whoever started them."""

    def overhead(self, spec: VmSpec) -> Bytes:
        """Memory beyond the guest's RAM that such a machine takes, measured on this host's builds."""

    async def check(self, spec: VmSpec) -> None:
        """Raises ``invalid`` or ``host-lacks`` when this host could never run it, naming the field and the limit."""

    async def launch(self, plan: LaunchPlan) -> VmRuntime:
        """Start the process with its vCPUs held; return when it answers. Nothing is left behind when it raises.

        Idempotent for one ``plan.vm.id``: what an interrupted launch of the same VM left is ended first.
        Raises ``qemu-failed`` with QEMU's last words, ``host-lacks``, ``timeout``.
        """

    async def attach(self, runtime: VmRuntime) -> StatefulMachine | None:
        """Connect to a machine that was launched, perhaps by an earlier daemon; ``None`` when it is gone."""

    async def retire(self, vm_id: str, incarnation: int) -> None:
        """End this one machine of the VM and remove what was its alone; another incarnation goes on. Idempotent."""

    def build_of(self, spec: VmSpec) -> MachineBuild:
        """What a state of such a machine would fit if it began now. Raises ``host-lacks`` before any machine could."""

    async def build(self, runtime: VmRuntime) -> MachineBuild:
        """What a state of this machine fits."""

    async def autopsy(self, runtime: VmRuntime) -> Exit:
        """How a machine that is gone ended, from what it left behind."""

    async def cleanup(self, vm_id: str, runtime: VmRuntime | None) -> None:
        """End a machine that may be left of ``vm_id`` and remove everything but its disks and logs. Idempotent."""

    async def erase(self, vm_id: str) -> None:
        """As :meth:`cleanup`, and its logs too. Idempotent."""

    async def leftovers(self, known: set[str]) -> list[str]:
        """Ids of VMs that have something on this host although they are not in ``known``."""
