"""Snapshots: a whole machine at one moment, made of parts that never change.

A part is one file: the layer a disk was at that moment, its UEFI variables, a RAM image, the pages changed since that
image, the state of the devices. Parts are shared: a snapshot, the machine that went on, and every fork refer to the
same ones. Nothing counts references: what is reachable from snapshots and VMs stays, the reaper removes the rest.

    snapshot ──► disk layers ──► older layers ──► image
             ──► devices, changed pages ──► RAM image
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mica.model.units import Bytes
from mica.model.vm import VmSpec


class PartKind(StrEnum):
    DISK = "disk"
    NVRAM = "nvram"
    RAM = "ram"
    CHANGES = "changes"
    DEVICES = "devices"


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """What a layer will be with the layers below merged into it. ``digest`` is empty while that is being made."""

    base: str
    size: Bytes = Bytes(0)
    digest: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One file that never changes. ``base`` is the part it lies over (a layer's older layer, changed pages' RAM image).

    ``image`` is the digest of the image that a lowest layer lies over. ``size`` is what it takes on the host in bytes.
    ``digest`` is empty until the file is complete, on disk and checksummed; ``damaged`` says what a check found.
    ``merging`` is what the file is about to become, or may be already.
    """

    id: str
    kind: PartKind
    created_at: float
    name: str = ""
    base: str = ""
    image: str = ""
    size: Bytes = Bytes(0)
    digest: str = ""
    verified_at: float | None = None
    damaged: str = ""
    merging: Merged | None = None


class SnapshotKind(StrEnum):
    """Why it was made. ``safety``: before something that replaces the present state. ``fork``: the moment at which
    forks began; its RAM need not be on disk, and it goes when nothing needs it any more. ``suspend``: the memory of a
    suspended VM, without its disks, which stay as they are; it goes when the VM goes on. ``template``: what others
    begin at, under a name of its own; it outlives its VM. ``schedule``: taken by itself, and deleted by a rule.
    ``boot``: an image right after it has booted, at which VMs of that image and shape begin; nobody's, and it outlives
    the hidden VM that it was taken of."""

    USER = "user"
    SAFETY = "safety"
    FORK = "fork"
    SUSPEND = "suspend"
    TEMPLATE = "template"
    SCHEDULE = "schedule"
    BOOT = "boot"


# What a VM's own past is made of: its tree of snapshots shows these, and it goes back to them.
HISTORY = frozenset({SnapshotKind.USER, SnapshotKind.SAFETY, SnapshotKind.SCHEDULE})
# What outlives the VM that it was taken of.
LASTING = frozenset({SnapshotKind.TEMPLATE, SnapshotKind.BOOT})


class SnapshotState(StrEnum):
    """``taking``: the machine is about to be captured. ``frozen``: its disks are layers and its RAM is an image, so
    that copies can be got ready, and wait for the state of its devices. ``saving``: captured and usable, its parts are
    being written and checksummed. ``complete``: every part is on disk with its checksum."""

    TAKING = "taking"
    FROZEN = "frozen"
    SAVING = "saving"
    COMPLETE = "complete"


class MachineBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What a device state fits: the QEMU that wrote it (version and package), machine type, CPU model, accelerator."""

    qemu: str
    machine: str
    cpu: str
    accelerator: str


class MemoryState(msgspec.Struct, frozen=True, kw_only=True):
    """The running half of a machine, by part ids. ``changes`` is empty where the RAM image is the memory as it was.
    ``inside`` counts the NICs whose network was a part of its QEMU: the state of those is in ``devices`` too."""

    ram: str
    devices: str
    build: MachineBuild
    changes: str = ""
    inside: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A machine at one moment. ``disks`` maps each disk (and the UEFI variables) to its layer. ``memory`` is ``None``
    when the machine was stopped or its memory was not wanted. ``parent`` is the snapshot that it descends from.
    ``quiesced``: the guest had frozen its file systems. ``schedule`` is the id of the schedule that had it taken.
    ``used_at``: when a VM last began at a ``boot``. ``lost`` says what its machine lost by it, nothing as a rule.
    ``standby``: how many VMs are to stand by at a ``template``."""

    id: str
    vm_id: str
    vm_name: str
    name: str
    spec: VmSpec
    created_at: float
    created_by: str
    kind: SnapshotKind = SnapshotKind.USER
    state: SnapshotState = SnapshotState.TAKING
    parent: str = ""
    disks: dict[str, str] = {}
    memory: MemoryState | None = None
    description: str = ""
    protected: bool = False
    pause_s: float | None = None
    lost: tuple[str, ...] = ()
    quiesced: bool = False
    schedule: str = ""
    used_at: float | None = None
    standby: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Ids of the parts it consists of, without what lies below them."""
        memory = (self.memory.ram, self.memory.changes, self.memory.devices) if self.memory else ()
        return tuple(part for part in (*self.disks.values(), *memory) if part)
