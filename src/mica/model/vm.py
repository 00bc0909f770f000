"""Virtual machines: what the user wants (spec, intent), and what is seen (observed, runtime).

The three never mix. ``VmSpec`` and ``intent`` are written only on a user's word; ``VmObserved`` only from what QEMU,
the guest and the host say; what Mica is doing about the difference is an operation, in ``mica.model.operation``.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import msgspec

from mica.model.errors import Problem, invalid
from mica.model.identity import Identity, Report
from mica.model.image import DiskFormat, Firmware
from mica.model.units import MIB, Bytes, format_size

_LABEL = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
_LABEL_KEY = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$")

MAX_DISKS = 16
MAX_NICS = 8
MAX_CPUS = 255
MIN_MEMORY = Bytes(32 * MIB)
MIN_DISK = Bytes(MIB)
# What the UEFI variables are called among the disks of a VM.
NVRAM = "nvram"


class Machine(StrEnum):
    """The board: ``q35`` with PCI Express and ACPI; ``minimal`` is the same without what an appliance can do without
    (display, tablet, SATA, SMBus): less to emulate, less to attack. It boots a kernel directly or by SeaBIOS."""

    Q35 = "q35"
    MINIMAL = "minimal"


class NetworkKind(StrEnum):
    """``user``: outbound access through a process of the VM's own, no privileges. ``none``: a NIC with no link."""

    USER = "user"
    NONE = "none"


class IoLimits(msgspec.Struct, frozen=True):
    """Ceilings for one disk; 0 is no ceiling. Applied by QEMU's throttling, at run time too."""

    iops: int = 0
    bytes_per_s: Bytes = Bytes(0)


class DiskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio disk. ``image`` is the digest of the image it is a copy-on-write layer of, ``None`` for an empty one."""

    name: str
    size: Bytes
    image: str | None = None
    format: DiskFormat = DiskFormat.QCOW2
    read_only: bool = False
    limits: IoLimits = IoLimits()


class Publish(msgspec.Struct, frozen=True):
    """A guest port made reachable on the host. ``host_port`` 0 lets the host choose a free one."""

    guest_port: int
    host_port: int = 0
    host_address: str = "127.0.0.1"
    protocol: str = "tcp"


class NicSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio NIC. An empty ``mac`` is given one when the VM is created."""

    name: str = "net0"
    network: str = NetworkKind.USER
    mac: str = ""
    publish: tuple[Publish, ...] = ()


class VmSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is made of. Sizes in bytes.

    ``cpu_limit`` is in host processors (1.5 is one and a half); ``None`` gives as many as ``cpus``. ``image`` is the
    digest of the image it boots from. ``boot`` is the order in which disks and NICs are tried, by name. ``last_valid``:
    where damage keeps it from starting, every start goes back to its last valid snapshot.
    """

    cpus: int = 1
    memory: Bytes = Bytes(256 * MIB)
    machine: Machine = Machine.Q35
    firmware: Firmware = Firmware.BIOS
    cpu_model: str = ""
    cpu_limit: float | None = None
    image: str | None = None
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = (NicSpec(),)
    boot: tuple[str, ...] = ()
    display: bool = True
    agent: bool = True
    autostart: bool = False
    protected: bool = False
    ephemeral: bool = False
    hostname: str = ""
    stop_timeout_s: float = 60.0
    last_valid: bool = False


class Power(StrEnum):
    """What the user wants of a VM's power."""

    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"


class VmState(StrEnum):
    """What is seen of a VM. Transitions are in ``mica.model.transitions``."""

    CREATING = "creating"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    SUSPENDED = "suspended"
    CRASHED = "crashed"
    TRASHED = "trashed"
    DELETING = "deleting"
    GONE = "gone"


class AgentState(StrEnum):
    """``absent``: the VM has no agent port. ``waiting``: the guest has not opened it. ``ready``: it has."""

    ABSENT = "absent"
    WAITING = "waiting"
    READY = "ready"


class VmObserved(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU, the guest and the host say. ``since`` is Unix time in seconds.

    ``reason`` says why a VM is where it is, for people: ``the guest shut down``, ``forced after 60 s`` …
    ``problem`` holds what went wrong when the last start or run failed, with QEMU's own last words.
    """

    state: VmState = VmState.CREATING
    since: float = 0.0
    reason: str = ""
    problem: Problem | None = None
    agent: AgentState = AgentState.ABSENT
    started_at: float | None = None
    hostname: str = ""
    os: str = ""
    addresses: tuple[str, ...] = ()


class ProcessRef(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for another: ``start_ticks`` is field 22 of ``/proc/PID/stat`` (proc(5))."""

    pid: int
    start_ticks: int
    boot_id: str


class NicRuntime(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC as it is attached: an opaque handle of the network adapter, and what the user wants to know of it.

    ``processes`` work for this NIC alone and belong into the VM's control group. ``reduced`` says in words what the
    network does not give on this host. ``inside``: it is a part of the machine's QEMU, and its connections end with
    that process.
    """

    name: str
    address: str = ""
    publish: tuple[Publish, ...] = ()
    reduced: tuple[str, ...] = ()
    inside: bool = False
    processes: tuple[ProcessRef, ...] = ()
    handle: dict[str, Any] = {}


class VmRuntime(msgspec.Struct, frozen=True, kw_only=True):
    """What a started VM holds on this host: all that a new daemon needs to find and drive it again.

    ``spec`` is the spec it was started with, so that pending changes can be told. ``handle`` is the hypervisor
    adapter's own, ``slice`` the slice adapter's. ``overhead`` is the memory beyond the guest's RAM that was reserved.
    ``ram`` is the RAM image (a part) that the machine maps privately, empty while its RAM is its own. ``incarnation``
    tells the QEMU processes apart that one VM may have had since its start.
    """

    process: ProcessRef
    spec: VmSpec
    run_dir: str
    accelerator: str
    started_at: float
    overhead: Bytes = Bytes(0)
    nics: tuple[NicRuntime, ...] = ()
    slice: dict[str, Any] = {}
    handle: dict[str, Any] = {}
    reduced: tuple[str, ...] = ()
    ram: str = ""
    incarnation: int = 0


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """The user's side of a VM: the ``vm`` row. ``id`` is a UUID and is the machine's UUID in SMBIOS.

    ``slot`` is a small number, unique among the VMs of one host, from which its uid and its private network derive.
    ``deleted_at`` and ``expires_at`` (Unix seconds) are set while it lies in the trash. ``snapshot`` is the one that
    its present state descends from; ``layers`` maps disks to the parts directly below them, where they lie over parts.
    ``forked_from`` is the name of the VM that it began as a copy of. ``hidden``: nobody's, and nobody sees it.
    """

    id: str
    name: str
    spec: VmSpec
    slot: int
    created_at: float
    created_by: str
    intent: Power = Power.STOPPED
    labels: dict[str, str] = {}
    description: str = ""
    image_name: str = ""
    snapshot: str = ""
    layers: dict[str, str] = {}
    forked_from: str = ""
    hidden: bool = False
    deleted_at: float | None = None
    expires_at: float | None = None


class Suspended(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory of a VM without a process is: a snapshot (its id), and what the machine was made of."""

    snapshot: str
    spec: VmSpec


class VmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The seen side of a VM: the ``vm.status`` row, written by the VM's actor and by operations on it.

    ``identity`` tells of a copied machine what it has of its own by now; ``becoming`` is who it is yet to be.
    ``frozen`` is the id of the operation for which its guest's file systems may be frozen still, ``checking`` that of
    the snapshot (or the RAM image) that it went back to, while not all of that has been compared with its checksums.
    While there is ``suspended``, no vCPU has run and no disk was written since: it goes on there.
    """

    observed: VmObserved
    runtime: VmRuntime | None = None
    identity: Report = ()
    becoming: Identity | None = None
    frozen: str = ""
    checking: str = ""
    suspended: Suspended | None = None


def check_name(name: str, noun: str = "name") -> str:
    """Return ``name`` if it is a DNS label (RFC 1123 section 2.1, at most 63 characters). Raises ``invalid``."""
    if not _LABEL.fullmatch(name):
        raise invalid(
            f"{noun} {name!r} is not a DNS label",
            hint="use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            name=name,
        )
    return name


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Labels are ``key=value``; keys are short words, values any text of at most 255 characters. Raises ``invalid``."""
    if len(labels) > 64:
        raise invalid(f"{len(labels)} labels; a VM has at most 64", hint="remove some with --unlabel KEY")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise invalid(f"label key {key!r} is not usable", hint="use letters, digits, '.', '_', '/' and '-'")
        if len(value) > 255 or not value.isprintable():
            raise invalid(f"the value of label {key!r} is longer than 255 characters or not printable")
    return labels


def _check_publish(nic: NicSpec, seen: set[tuple[str, int, str]]) -> None:
    for publish in nic.publish:
        if publish.protocol not in ("tcp", "udp"):
            raise invalid(f"cannot publish protocol {publish.protocol!r}", hint="use tcp or udp")
        if not (1 <= publish.guest_port <= 65535 and 0 <= publish.host_port <= 65535):
            raise invalid(f"cannot publish {publish.host_port}:{publish.guest_port}", hint="ports are 1 to 65535")
        key = (publish.host_address, publish.host_port, publish.protocol)
        if publish.host_port and key in seen:
            raise invalid(f"port {publish.host_port} is published twice", hint=f"choose another one for NIC {nic.name}")
        seen.add(key)


def _check_disks(spec: VmSpec) -> None:
    if len(spec.disks) > MAX_DISKS or len(spec.nics) > MAX_NICS:
        raise invalid(f"a VM has at most {MAX_DISKS} disks and {MAX_NICS} NICs")
    for disk in spec.disks:
        check_name(disk.name, "disk name")
        if disk.name == NVRAM:
            raise invalid(f"no disk can be named {NVRAM!r}, as the UEFI variables are", hint="choose another name")
        if disk.size < MIN_DISK:
            raise invalid(f"disk {disk.name} of {format_size(disk.size)} is below {format_size(MIN_DISK)}")
        if disk.limits.iops < 0 or disk.limits.bytes_per_s < 0:
            raise invalid(f"disk {disk.name}: limits cannot be negative", hint="0 is no limit")
        if disk.size % 512:
            raise invalid(f"disk {disk.name}: {disk.size} bytes is not a multiple of 512", hint="round it up")
    published: set[tuple[str, int, str]] = set()
    for nic in spec.nics:
        check_name(nic.name, "NIC name")
        _check_publish(nic, published)


def check_spec(spec: VmSpec) -> VmSpec:
    """Return ``spec`` if a machine like that can exist on any host. Raises ``invalid`` naming the field."""
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise invalid(f"{spec.cpus} vCPUs; a VM has 1 to {MAX_CPUS}")
    if spec.memory < MIN_MEMORY:
        raise invalid(f"memory of {format_size(spec.memory)} is below {format_size(MIN_MEMORY)}")
    if spec.memory % MIB:
        raise invalid(f"memory of {spec.memory} bytes is not a whole number of MiB", hint="write for example 512M")
    if spec.cpu_limit is not None and not 0.01 <= spec.cpu_limit <= 1024:
        raise invalid(f"a CPU limit of {spec.cpu_limit} is not between 0.01 and 1024 host processors")
    if not 0 <= spec.stop_timeout_s <= 86400:
        raise invalid(f"a stop time-out of {spec.stop_timeout_s} s is not between 0 and 86400")
    if spec.hostname:
        check_name(spec.hostname, "hostname")
    _check_disks(spec)
    names = [d.name for d in spec.disks] + [n.name for n in spec.nics]
    for name in names:
        if names.count(name) > 1:
            raise invalid(f"two devices are named {name!r}", hint="device names are unique within a VM")
    for name in spec.boot:
        if name not in names:
            raise invalid(f"boot order names {name!r}, which is no disk or NIC", hint=f"there are: {', '.join(names)}")
    if spec.machine is Machine.MINIMAL and spec.firmware is Firmware.UEFI:
        raise invalid("the minimal machine has no UEFI firmware", hint="use --machine q35")
    return spec


# Fields whose new value reaches a running machine at once. All others wait for the next start.
LIVE_FIELDS = frozenset({"cpu_limit", "autostart", "protected", "ephemeral", "stop_timeout_s", "last_valid"})


def as_of(then: VmSpec, now: VmSpec) -> VmSpec:
    """The machine of ``then``, with what is wished for it ``now``: a VM that goes back in time keeps its policies."""
    return msgspec.structs.replace(
        then,
        autostart=now.autostart,
        protected=now.protected,
        ephemeral=now.ephemeral,
        stop_timeout_s=now.stop_timeout_s,
        last_valid=now.last_valid,
    )


def pending_changes(spec: VmSpec, running: VmSpec) -> tuple[str, ...]:
    """Names of the fields that a restart would change; limits of disks apply at once and do not count."""
    out = []
    for field in spec.__struct_fields__:
        if field in LIVE_FIELDS:
            continue
        new, old = getattr(spec, field), getattr(running, field)
        if field == "disks":
            new = tuple(msgspec.structs.replace(d, limits=IoLimits()) for d in new)
            old = tuple(msgspec.structs.replace(d, limits=IoLimits()) for d in old)
        if new != old:
            out.append(field)
    return tuple(out)
