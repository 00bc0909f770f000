"""What the API shows: the rows of the engine put together for a reader. Requests bodies are here too.

These are the public shapes: ``openapi.json`` is generated from them, and the client and the command line use them.
Times are Unix seconds, sizes are bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from mica.model.identity import Report
from mica.model.image import Firmware, Image, ImageRecipe
from mica.model.operation import Operation
from mica.model.snapshot import Snapshot
from mica.model.units import Bytes
from mica.model.vm import (
    DiskSpec,
    Machine,
    NicRuntime,
    NicSpec,
    Power,
    ProcessRef,
    Publish,
    VmObserved,
    VmSpec,
)


class UsageSource(StrEnum):
    """Who counted: the VM's control group (its QEMU and its network process), or its QEMU's process alone."""

    CGROUP = "cgroup"
    PROCESS = "process"


class VmUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Real use on the host. ``cpu`` is in host processors, averaged over the last seconds; ``None``: not known (yet).

    ``memory`` is what the kernel charges to the VM's control group, guest RAM included; by ``process``, where the host
    has no groups for us, it is what its QEMU holds in memory (RssAnon and RssShmem of proc(5)). ``own`` is what its
    QEMU has for itself (RssAnon and VmSwap). ``shared`` is what the frozen memory takes that it reads together with its
    relatives, which is held once for all of them; one of them is charged for it. ``promised`` is what admission counts
    for it: all that it may take, or, where it shares its memory, what it has for itself and a reserve.
    """

    cpu: float | None = None
    cpu_s: float | None = None
    memory: Bytes | None = None
    own: Bytes | None = None
    shared: Bytes | None = None
    promised: Bytes | None = None
    disk: Bytes | None = None
    source: UsageSource | None = None


class VmView(msgspec.Struct, frozen=True, kw_only=True):
    """One VM: intent (``spec``, ``intent``), observed, and the operations about it. ``generation`` is what ``If-Match``
    takes. ``pending`` names the fields of ``spec`` that wait for a restart; then ``running`` is what it runs with.
    ``operations`` are the ids of those that are queued or running. ``reduced`` says what this VM does not get on this
    host, the jail being its only boundary under TCG among it. ``snapshot`` is the id of the snapshot that its present
    state descends from, ``forked_from`` the name of the VM that it began as a copy of; ``identity`` tells what a copy
    has of its own by now, and what it shares with that VM still. ``damaged`` says what a check found wrong with layers
    that its disks lie over, and with the memory that it shares.
    """

    id: str
    name: str
    generation: int
    intent: Power
    spec: VmSpec
    observed: VmObserved
    labels: dict[str, str]
    description: str
    image_name: str
    created_at: float
    created_by: str
    deleted_at: float | None = None
    expires_at: float | None = None
    pending: tuple[str, ...] = ()
    running: VmSpec | None = None
    operations: tuple[str, ...] = ()
    accelerator: str = ""
    process: ProcessRef | None = None
    nics: tuple[NicRuntime, ...] = ()
    usage: VmUsage = VmUsage()
    reduced: tuple[str, ...] = ()
    snapshot: str = ""
    forked_from: str = ""
    identity: Report = ()
    damaged: tuple[str, ...] = ()


class SnapshotCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/vms/{vm}/snapshots``. ``memory``: with the memory and devices of a VM that runs or is paused.

    ``quiesce`` has the guest's agent freeze its file systems for the moment. An empty ``name`` is made up.
    """

    name: str = ""
    memory: bool = True
    quiesce: bool = False
    description: str = ""


class SnapshotRestore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/vms/{vm}/snapshots/{snapshot}/restore``. ``keep``: the present state becomes a snapshot
    first. ``memory`` false: only its disks and settings come back, and the VM is stopped then."""

    keep: bool = True
    memory: bool = True
    overcommit: bool = False


class SnapshotSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``PATCH /v1/vms/{vm}/snapshots/{snapshot}`` and of ``PATCH /v1/templates/{template}``; what is left out
    stays. ``standby``: how many VMs (0 to 64) are to wait at a template with memory, for the shortest start."""

    name: str | None = None
    description: str | None = None
    protected: bool | None = None
    standby: int | None = None


class TemplateCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/templates``: freeze the VM ``vm`` (its name or id) as it is now, for others to begin at.

    ``memory`` and ``quiesce`` are as in :class:`SnapshotCreate`. An empty ``name`` is made from the VM's.
    """

    vm: str
    name: str = ""
    memory: bool = True
    quiesce: bool = False
    description: str = ""


class VmFork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/vms/{vm}/fork``: ``count`` running copies (1 to 100) of a VM as it is now, or as it was at
    ``snapshot`` (its name or id). ``name``: the copies' name, or its beginning when there are several."""

    count: int = 1
    name: str = ""
    snapshot: str = ""
    overcommit: bool = False


class VmClone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/vms/{vm}/clone``: a stopped copy of a stopped VM, or of a VM as it was at ``snapshot`` (its
    name or id). ``full``: its disks are copied, and need nothing of the original's; otherwise they are layers over
    those. An empty ``name`` is made up."""

    name: str = ""
    snapshot: str = ""
    full: bool = False


class ForkAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a fork or clone: an operation for each copy, whose target is the new VM; ``freeze`` is the parent's
    own."""

    operations: tuple[Operation, ...]
    freeze: Operation | None = None


class SnapshotView(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. ``size`` is what its own parts take on the host in bytes; one that several have counts to the
    oldest of them.

    ``damaged`` says what a check found wrong with what it needs, part by part, and ``verified_at`` is when the part
    that was checked longest ago was. ``memory`` tells whether it has the memory of a running machine; ``current``
    whether its VM's present state descends directly from it; ``forks`` names the other VMs whose state does too.
    ``standing_by`` counts the VMs that wait at a template now, which are promised ``standby_memory`` bytes.
    """

    snapshot: Snapshot
    generation: int
    size: Bytes
    memory: bool
    current: bool
    complete: bool
    verified_at: float | None = None
    damaged: tuple[str, ...] = ()
    forks: tuple[str, ...] = ()
    standing_by: int = 0
    standby_memory: Bytes = Bytes(0)


class SnapshotPage(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots, oldest first."""

    revision: int
    items: tuple[SnapshotView, ...]


class VmCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/vms``. What is left out comes from the image; ``image`` is a name or digest, empty for none,
    or the name of a template. With that, or with ``snapshot`` (an id), it comes from there: the VM begins as a copy of
    that moment, memory and all with ``start``; with ``full`` its disks are copied, and lie over nothing of the
    original.

    ``name`` empty: one is made from the image's. ``disk`` is the size of the root disk (at least the image's),
    ``disks`` are further, empty ones. ``start`` starts it too, ``overcommit`` insists where memory does not suffice.
    ``cold``: it boots, although the image may have been booted once already.
    """

    name: str = ""
    image: str = ""
    snapshot: str = ""
    full: bool = False
    cpus: int | None = None
    memory: Bytes | None = None
    disk: Bytes | None = None
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] | None = None
    publish: tuple[Publish, ...] = ()
    machine: Machine = Machine.Q35
    firmware: Firmware | None = None
    cpu_model: str = ""
    cpu_limit: float | None = None
    boot: tuple[str, ...] = ()
    display: bool = True
    autostart: bool = False
    protected: bool = False
    ephemeral: bool = False
    hostname: str = ""
    stop_timeout_s: float = 60.0
    labels: dict[str, str] = {}
    description: str = ""
    start: bool = False
    cold: bool = False
    overcommit: bool = False


class VmStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``paused`` leaves the vCPUs held; ``overcommit`` insists where memory does not suffice. ``last_valid``: a VM that
    cannot start because of damage goes back to its last valid snapshot; what is damaged is kept aside as another one.
    """

    paused: bool = False
    overcommit: bool = False
    last_valid: bool = False


class VmStop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``force`` does not ask the guest; ``timeout_s`` is how long it is asked before that (``None``: the spec's)."""

    force: bool = False
    timeout_s: float | None = None


class VmDelete(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``purge`` deletes at once instead of into the trash; ``force`` stops it first."""

    purge: bool = False
    force: bool = False


class VmRestore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``name`` is the new name when the old one has been taken meanwhile."""

    name: str = ""


class VmSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``PATCH /v1/vms/{id}``: fields left out stay. A label with value ``None`` is removed."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    description: str | msgspec.UnsetType = msgspec.UNSET
    labels: dict[str, str | None] | msgspec.UnsetType = msgspec.UNSET
    cpus: int | msgspec.UnsetType = msgspec.UNSET
    memory: Bytes | msgspec.UnsetType = msgspec.UNSET
    cpu_limit: float | msgspec.UnsetType | None = msgspec.UNSET
    cpu_model: str | msgspec.UnsetType = msgspec.UNSET
    disks: tuple[DiskSpec, ...] | msgspec.UnsetType = msgspec.UNSET
    nics: tuple[NicSpec, ...] | msgspec.UnsetType = msgspec.UNSET
    boot: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    display: bool | msgspec.UnsetType = msgspec.UNSET
    autostart: bool | msgspec.UnsetType = msgspec.UNSET
    protected: bool | msgspec.UnsetType = msgspec.UNSET
    stop_timeout_s: float | msgspec.UnsetType = msgspec.UNSET
    last_valid: bool | msgspec.UnsetType = msgspec.UNSET


class BootedView(msgspec.Struct, frozen=True, kw_only=True):
    """A state of an image that was booted once, for machines of one shape. ``size`` is what it takes on disk;
    ``used_at`` is when a VM last began there."""

    id: str
    spec: VmSpec
    size: Bytes
    created_at: float
    used_at: float | None = None


class ImageView(msgspec.Struct, frozen=True, kw_only=True):
    """An image on this host; ``used_by`` are names of VMs made from it. ``damaged`` says what verification found.
    ``booted`` are states at which VMs made from it begin instead of booting."""

    image: Image
    generation: int
    used_by: tuple[str, ...] = ()
    verified_at: float | None = None
    damaged: str = ""
    booted: tuple[BootedView, ...] = ()


class ImageMake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/images``."""

    recipe: ImageRecipe


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """This host and its daemon. ``committed`` is memory promised to running VMs, overhead included, ``shared`` what the
    frozen memory takes that copies share, each counted once. ``left`` is what one more VM may be promised; below 0 when
    copies have come to need more than there is. ``booted`` is the disk that states of images take which were booted
    once, of ``booted_limit``; 0 where images always boot."""

    hostname: str
    version: str
    pid: int
    home: str
    started_at: float
    cpus: int
    memory: Bytes
    available: Bytes
    reserve: Bytes
    committed: Bytes
    shared: Bytes
    left: int
    vms: int
    running: int
    accelerator: str
    qemu: str
    booted: Bytes = Bytes(0)
    booted_limit: Bytes = Bytes(0)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Keys shared by lists: ``next`` is the ``after`` of the next page, empty at the end."""

    revision: int
    next: str = ""


class VmPage(Page, frozen=True, kw_only=True):
    items: tuple[VmView, ...]


class OperationPage(Page, frozen=True, kw_only=True):
    items: tuple[Operation, ...]


class ImagePage(Page, frozen=True, kw_only=True):
    items: tuple[ImageView, ...]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One change: ``kind`` is ``vm``, ``operation``, ``image`` or ``snapshot``. ``object`` is its view now, ``None``
    when it is gone.

    ``revision`` is what ``since`` takes to go on from here.
    """

    revision: int
    kind: str
    id: str
    object: Any = None


class Resolve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator decides of a stuck operation: ``retry`` the undo, or ``accept`` what is left as it is."""

    how: str
