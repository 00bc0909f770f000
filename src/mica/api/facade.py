"""What the API needs of the engine, as small Protocols. ``mica.engine.engine.Engine`` is all of them together.

Every method raises :class:`mica.model.errors.MicaError` and nothing else that a person should read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Any, Literal, Protocol

import msgspec

from mica.model.doctor import DoctorReport
from mica.model.exec import ExecSpec, ExecView
from mica.model.operation import Actor, Operation
from mica.model.schedule import SchedulePage, ScheduleView
from mica.model.views import (
    Event,
    ForkAccepted,
    HostView,
    ImagePage,
    ImageView,
    OperationPage,
    SnapshotPage,
    SnapshotRestore,
    SnapshotView,
    VmClone,
    VmFork,
    VmPage,
    VmView,
)


class Verbs(Protocol):
    """Everything that changes something is accepted as a durable operation."""

    async def submit(
        self,
        verb: str,
        target: str,
        params: msgspec.Struct,
        *,
        by: Actor,
        if_match: int | None = None,
        idempotency_key: str = "",
    ) -> Operation:
        """``target`` is a VM's id, the unique beginning of one, or its name; an image's name or digest; a snapshot's
        id; or empty."""

    async def restore(
        self, vm: str, snapshot: str, params: SnapshotRestore, *, by: Actor, idempotency_key: str = ""
    ) -> Operation:
        """Bring a VM back to a snapshot of it, which is named as in :meth:`Reads.snapshot`."""

    async def fork(self, vm: str, params: VmFork, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        """Running copies of a VM, as it is or as it was at a snapshot."""

    async def clone(self, vm: str, params: VmClone, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        """A stopped copy of a stopped VM, or of a VM as it was at a snapshot."""

    async def cancel(self, operation_id: str, *, by: Actor) -> Operation: ...

    async def resolve(self, operation_id: str, how: str, *, by: Actor) -> Operation: ...


class Reads(Protocol):
    """What there is. Lists come in pages of at most ``limit``."""

    async def vm(self, ref: str) -> VmView: ...

    async def vms(
        self, *, after: str = "", limit: int = 100, trashed: bool = False, labels: dict[str, str] | None = None
    ) -> VmPage: ...

    async def operation(self, operation_id: str) -> Operation: ...

    async def operations(
        self, *, after: str = "", limit: int = 100, vm: str = "", active: bool = False
    ) -> OperationPage:
        """Newest first."""

    async def image(self, ref: str) -> ImageView: ...

    async def images(self) -> ImagePage: ...

    async def snapshots(self, vm: str = "", *, forks: bool = False) -> SnapshotPage:
        """Of all VMs, or of one; with ``forks`` also the moments at which forks began."""

    async def snapshot(self, vm: str, ref: str) -> SnapshotView:
        """``ref`` is a name within the VM, an id, or the unique beginning of one."""

    async def templates(self) -> SnapshotPage: ...

    async def template(self, ref: str) -> SnapshotView:
        """``ref`` is a name, an id, or the unique beginning of one."""

    async def schedules(self) -> SchedulePage: ...

    async def schedule(self, ref: str) -> ScheduleView:
        """``ref`` is an id, or the unique beginning of one."""

    async def host(self) -> HostView: ...

    async def doctor(self, *, fresh: bool = False) -> DoctorReport: ...


class Changes(Protocol):
    """What happens."""

    async def revision(self) -> int: ...

    def events(self, since: int | None) -> AsyncIterator[Event]:
        """Events after ``since`` and then live ones, without end. Raises ``gone`` at once when that is too old."""


class Consoles(Protocol):
    """The serial port of a VM: a history addressed by offset, then what comes; and QEMU's own messages."""

    def console_follow(self, vm: str, offset: int | None) -> AsyncIterator[tuple[int, bytes]]:
        """Pairs of offset and data, without end. ``None``: the last 64 KiB. Any number of readers."""

    async def console_write(self, vm: str, data: bytes) -> None: ...

    async def log(self, vm: str, which: str, tail: int) -> bytes:
        """The last ``tail`` bytes of ``console`` or ``qemu``."""


class Execs(Protocol):
    """Commands in guests. Their output is kept, and read by offset."""

    async def exec_start(self, vm: str, spec: ExecSpec, *, by: Actor) -> ExecView: ...

    async def execs(self, vm: str) -> list[ExecView]: ...

    async def exec_state(self, vm: str, exec_id: str) -> ExecView: ...

    async def exec_wait(self, vm: str, exec_id: str) -> ExecView:
        """The command once it has ended."""

    def exec_follow(
        self, vm: str, exec_id: str, stream: Literal["stdout", "stderr"], offset: int
    ) -> AsyncIterator[bytes]:
        """Output from ``offset`` on; ends when the command has ended and all is delivered."""

    async def exec_stdin(self, vm: str, exec_id: str, data: bytes | None) -> None:
        """Returns when the command's input has room again. ``None`` closes it."""

    async def exec_kill(self, vm: str, exec_id: str, signal: int) -> None: ...


class Files(Protocol):
    """Tar streams in and out of guests."""

    def copy_in(self, vm: str, dest: str, tar: AsyncIterator[bytes], *, by: Actor, size: int = 0) -> Awaitable[Any]:
        """Unpack into the directory ``dest``; returns a summary of what was copied, as plain JSON or a struct.

        ``size`` is how many bytes the files will take there, 0 where nobody knows.
        """

    def copy_out(self, vm: str, path: str, *, by: Actor) -> AsyncIterator[bytes]:
        """A refusal is raised before the first chunk."""


class Facade(Verbs, Reads, Changes, Consoles, Execs, Files, Protocol):
    """The engine as the API sees it."""
