"""What a verb is made of: its parameters, what accepting it writes, and its ordered steps.

Each step's ``do`` can be repeated and returns plain JSON. Its ``undo`` takes back whatever ``do`` may have done, also
when ``do`` failed or was interrupted half way, and can be repeated too. The crash harness holds every verb to that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from mica.engine.admission import Candidate
from mica.engine.records import Draft, Ledger, Records, Versioned
from mica.model.errors import Problem
from mica.model.operation import Actor, Operation
from mica.model.units import MIB, Bytes
from mica.model.vm import ProcessRef, Vm, VmState, VmStatus
from mica.ports.clock import Clock
from mica.ports.guests import Guests
from mica.ports.host import Host
from mica.ports.hypervisor import Hypervisor, Machine, StatefulMachine
from mica.ports.identity import Identities
from mica.ports.images import Images
from mica.ports.networks import Networks
from mica.ports.parts import Branches, Parts
from mica.ports.ram import RamImages
from mica.ports.slices import Slices
from mica.ports.volumes import Volumes

if TYPE_CHECKING:
    from mica.model.transitions import VmVerb

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """``value`` as plain JSON, for the journal. Raises :class:`TypeError` for what cannot be."""
    return msgspec.to_builtins(value, enc_hook=_path_to_text)


def from_plain(value: Any, type_: type[T]) -> T:
    """The inverse of :func:`to_plain`."""
    return msgspec.convert(value, type_, dec_hook=_text_to_path)


def _path_to_text(value: Any) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a journal")


def _text_to_path(type_: type[Any], value: Any) -> Any:
    if issubclass(type_, PurePath):
        return type_(value)
    raise TypeError(f"{type_.__name__} has no place in a journal")


class NoParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a verb that has none."""


@dataclass(frozen=True)
class Policy:
    """What an administrator may tune. Sizes in bytes, times in seconds.

    ``reserve`` is memory that VMs never get, so that the host need not kill anything; ``uid_base`` is the first user
    id of jailed machines (``None``: no privileges to change user), to which a VM's slot is added. Each part of a
    snapshot is read again after ``scrub_every_s``, at ``scrub_rate`` bytes per second (0: never). ``boot_space`` is the
    disk that states of images may take which were booted once (0: images always boot), ``warm`` the memory in which
    RAM images are kept that nothing maps, for the next one that begins there.
    """

    reserve: int = 512 * MIB
    trash_s: float = 7 * 86400.0
    operation_retention_s: float = 30 * 86400.0
    scrub_rate: int = 32 * MIB
    scrub_every_s: float = 7 * 86400.0
    inbox_capacity: int = 16
    uid_base: int | None = None
    boot_space: int = 0
    warm: int = 0

    def owner(self, slot: int) -> tuple[int, int] | None:
        """User and group id of the machine in ``slot``; ``None``: the daemon's own."""
        return None if self.uid_base is None else (self.uid_base + slot, self.uid_base + slot)


class Sampler(Protocol):
    """Recent use of the running VMs, from memory."""

    def candidates(self, ledger: Ledger) -> list[Candidate]:
        """Running VMs that could make room for another."""

    def own(self, vm_id: str, process: ProcessRef) -> Bytes | None:
        """Memory that this machine's process has for itself, pages that it only shares left out; ``None`` while nobody
        has looked at it."""

    def busy(self, vm_ids: Collection[str]) -> float:
        """Processors that these VMs use; one for each that nobody has looked at yet."""


class Machines(Protocol):
    """The live machines, as their actors hold them."""

    def machine(self, vm_id: str) -> Machine | None: ...

    async def attach(self, vm_id: str) -> StatefulMachine | None:
        """Connect to the VM's machine by its recorded runtime, and hand it to the VM's actor."""

    def detach(self, vm_id: str) -> None:
        """Forget the machine: its process is gone."""

    async def ended(self, vm_id: str) -> bool:
        """Whether the VM has no process any more. One that is just dying gets a moment for it."""

    def wanted(self, vm_id: str, *, but: str = "") -> bool:
        """Whether an operation that was accepted, other than ``but``, will bring the VM up."""


@dataclass(frozen=True)
class Ports:
    """What the engine needs from outside. Built once, by the composition root."""

    records: Records
    clock: Clock
    host: Host
    hypervisor: Hypervisor
    volumes: Volumes
    networks: Networks
    slices: Slices
    images: Images
    guests: Guests
    identities: Identities
    parts: Parts
    branches: Branches
    ram: RamImages
    policy: Policy


@dataclass(frozen=True)
class Env(Ports):
    """Everything a step may use: the ports, and what the engine itself has in memory.

    ``on_ended`` is told of each operation that has ended, once it is written.
    """

    machines: Machines
    sampler: Sampler
    on_ended: Callable[[Operation], None]


@dataclass
class Context:
    """One run of one operation. ``outputs`` are those of earlier steps; ``failure`` is set while unwinding."""

    env: Env
    operation: Operation
    outputs: dict[str, Any]
    report: Callable[[float | None, str], None]
    failure: Problem | None = None

    @property
    def vm_id(self) -> str:
        return self.operation.target.partition("/")[2]

    def output(self, step: str, type_: type[T]) -> T:
        """What an earlier step returned."""
        return from_plain(self.outputs[step], type_)

    def params(self, type_: type[T]) -> T:
        return msgspec.convert(self.operation.params, type_)


Do = Callable[[Context], Awaitable[Any]]
Undo = Callable[[Context], Awaitable[None]]


@dataclass(frozen=True)
class Step:
    """``cancellable``: ``do`` may be interrupted where it stands, its ``undo`` cleans up. ``timeout_s`` bounds each,
    but taking something back never gets more than a few minutes.

    ``follows``: once the step before is done there is no way back before this one, whoever wants to cancel.
    ``words`` are what a reader sees while it runs ("making the disks"); ``name`` is what the journal knows it by.
    """

    name: str
    do: Do
    undo: Undo | None = None
    cancellable: bool = True
    follows: bool = False
    timeout_s: float = 120.0
    words: str = ""

    def __post_init__(self) -> None:
        if not self.words:
            object.__setattr__(self, "words", self.name)


@dataclass
class Proposal:
    """A request about to be accepted. ``plan`` checks it, writes what must be written at once into ``draft``, and may
    replace ``params`` with what the steps need to know. ``vm`` and ``status`` are absent for a new VM or an image.
    ``expected`` is the state in which the VM will be once all has ended that was accepted before."""

    env: Env
    params: msgspec.Struct
    by: Actor
    draft: Draft
    target_id: str
    target_name: str = ""
    vm: Versioned[Vm] | None = None
    status: Versioned[VmStatus] | None = None
    expected: VmState | None = None
    stored_params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Definition:
    """One verb. ``noun`` is what it works on; ``state_verb`` ties it to the table of transitions.

    ``anchored``: the first step does nothing, and its undo takes back what ``plan`` wrote; so a request that comes to
    nothing while it waits is taken back too.
    """

    verb: str
    noun: str
    params: type[msgspec.Struct]
    plan: Callable[[Proposal], Awaitable[None]]
    steps: Callable[[Operation], Sequence[Step]]
    state_verb: VmVerb | None = None
    result: Callable[[Context], dict[str, Any]] = lambda _context: {}
    creates: bool = False
    anchored: bool = False
