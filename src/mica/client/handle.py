"""One VM in the hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mica.client.operations import OnProgress
from mica.client.snapshots import Snapshots
from mica.client.vms import AGENT_TIMEOUT_S, Vms, vm_id
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.units import parse_size
from mica.model.views import SnapshotCreate, SnapshotRestore, SnapshotView, VmClone, VmFork, VmSet, VmView
from mica.model.vm import VmState

if TYPE_CHECKING:
    from mica.client.archives import CopyReport, OnBytes
    from mica.client.console import Console
    from mica.client.execs import ExecResult, ExecStream, Stdin


class VmHandle:
    """A VM of one client. ``view`` is what was known of it when it was last asked about; ``refresh`` asks again.

    As an asynchronous context manager it deletes the VM at the end if it was made with ``rm=True``.
    """

    def __init__(self, vms: Vms, view: VmView) -> None:
        self._vms = vms
        self.view = view
        self.rm = False

    def __repr__(self) -> str:
        return f"<VmHandle {self.name} {self.id[:8]} {self.state}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rm:
            await self.remove()

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def state(self) -> VmState:
        return self.view.observed.state

    async def refresh(self) -> VmView:
        """Ask again what is known of it. Raises ``not-found`` when it is gone."""
        self.view = await self._vms.view(self.id)
        return self.view

    async def start(
        self,
        *,
        paused: bool = False,
        overcommit: bool = False,
        last_valid: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Self:
        """Raises ``insufficient-memory`` with the numbers and the ways out, ``qemu-failed`` with QEMU's words,
        ``corrupt`` naming the last valid snapshot, to which ``last_valid`` goes back (what is damaged is kept)."""
        return await self._after(
            await self._vms.start(
                self.id, paused=paused, overcommit=overcommit, last_valid=last_valid, on_progress=on_progress
            )
        )

    async def stop(
        self, *, force: bool = False, timeout_s: float | None = None, on_progress: OnProgress | None = None
    ) -> Self:
        """Ask the guest to shut down, and force it after ``timeout_s``; ``view.observed.reason`` says which it was."""
        return await self._after(
            await self._vms.stop(self.id, force=force, timeout_s=timeout_s, on_progress=on_progress)
        )

    async def restart(
        self, *, force: bool = False, timeout_s: float | None = None, on_progress: OnProgress | None = None
    ) -> Self:
        return await self._after(
            await self._vms.restart(self.id, force=force, timeout_s=timeout_s, on_progress=on_progress)
        )

    async def pause(self) -> Self:
        return await self._after(await self._vms.pause(self.id))

    async def suspend(self, *, on_progress: OnProgress | None = None) -> Self:
        """Its memory goes to disk and its process ends; ``start`` and ``resume`` go on exactly there, also after the
        host has been off. Raises ``insufficient-disk``; then it runs on."""
        return await self._after(await self._vms.suspend(self.id, on_progress=on_progress))

    async def discard(self) -> Self:
        """Give up what it had in memory when it was suspended: it is stopped then, as after a power cut."""
        return await self._after(await self._vms.discard(self.id))

    async def resume(self) -> Self:
        """Let it run on, paused or suspended."""
        return await self._after(await self._vms.resume(self.id))

    async def restore(self, *, name: str = "") -> Self:
        """Bring it back from the trash."""
        return await self._after(await self._vms.restore(self.id, name=name))

    @property
    def _snapshots(self) -> Snapshots:
        return Snapshots(self._vms.transport, self._vms.operations)

    async def snapshot(
        self,
        name: str = "",
        *,
        memory: bool = True,
        quiesce: bool = False,
        description: str = "",
        on_progress: OnProgress | None = None,
    ) -> SnapshotView:
        """Take a snapshot: all disks, and, while it runs, its memory and devices (unless ``memory`` is false).

        ``quiesce`` has the guest's agent freeze its file systems for the moment. Returns when all of it is on disk
        with its checksums. Raises ``exists``, ``state-conflict``, ``insufficient-disk``.
        """
        body = SnapshotCreate(name=name, memory=memory, quiesce=quiesce, description=description)
        operation = await self._snapshots.create(self.id, body, on_progress=on_progress)
        return await self._snapshots.get(self.id, operation.result["id"])

    async def snapshots(self) -> list[SnapshotView]:
        """Its snapshots, oldest first."""
        return await self._snapshots.list(self.id)

    async def restore_snapshot(
        self,
        snapshot: str,
        *,
        keep: bool = True,
        memory: bool = True,
        overcommit: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Self:
        """Back to a snapshot, by name or id. The present state becomes a snapshot first unless ``keep`` is false.

        A snapshot with memory runs on where it was; without, or with ``memory=False``, the VM is stopped then. Raises
        ``corrupt``, ``host-lacks``, ``insufficient-memory``.
        """
        body = SnapshotRestore(keep=keep, memory=memory, overcommit=overcommit)
        return await self._after(await self._snapshots.restore(self.id, snapshot, body, on_progress=on_progress))

    async def fork(
        self,
        count: int = 1,
        *,
        name: str = "",
        snapshot: str = "",
        overcommit: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[VmHandle]:
        """``count`` running copies of it as it is now, or as it was at ``snapshot``; it goes on itself.

        ``name`` is the copies' name, or its beginning when there are several. Returns when all run. Raises
        ``insufficient-memory``, ``exists``, ``state-conflict``.
        """
        body = VmFork(count=count, name=name, snapshot=snapshot, overcommit=overcommit)
        done = await self._snapshots.forked(await self._snapshots.fork(self.id, body), on_progress)
        return [VmHandle(self._vms, await self._vms.view(vm_id(operation))) for operation in done]

    async def clone(
        self, *, name: str = "", snapshot: str = "", full: bool = False, on_progress: OnProgress | None = None
    ) -> VmHandle:
        """A stopped copy of it, while it is stopped, or as it was at ``snapshot``.

        Its disks are layers over this one's; with ``full`` they are copied, and need nothing of it. Raises ``exists``,
        ``state-conflict``, ``insufficient-disk``.
        """
        body = VmClone(name=name, snapshot=snapshot, full=full)
        (done,) = await self._snapshots.forked(await self._snapshots.clone(self.id, body), on_progress)
        return VmHandle(self._vms, await self._vms.view(vm_id(done)))

    async def set(self, *, if_match: int | None = None, **fields: Any) -> Self:
        """Change fields of :class:`mica.model.views.VmSet`; ``memory`` may be words. See ``view.pending``."""
        if isinstance(fields.get("memory"), str):
            fields["memory"] = parse_size(fields["memory"])
        return await self._after(await self._vms.set(self.id, VmSet(**fields), if_match=if_match))

    async def delete(self, *, purge: bool = False, force: bool = False) -> None:
        """Into the trash, or for good with ``purge``; ``force`` stops it first."""
        await self._vms.delete(self.id, purge=purge, force=force)

    async def remove(self) -> None:
        """Stop it and delete it for good, whatever it does; that it is gone already is no error."""
        try:
            await self._vms.delete(self.id, purge=True, force=True)
        except MicaError as error:
            if error.code not in (Code.NOT_FOUND, Code.GONE):
                raise

    async def _after(self, _operation: Operation) -> Self:
        await self.refresh()
        return self

    async def wait_agent(self, *, timeout_s: float = AGENT_TIMEOUT_S) -> Self:
        """Wait until the guest agent answers. Raises ``agent-unavailable``."""
        self.view = await self._vms.wait_agent(self.id, timeout_s=timeout_s)
        return self

    async def log(self, which: str = "console", *, tail: int = 64 * 1024) -> bytes:
        """The last ``tail`` bytes of the serial ``console``'s history, or of ``qemu``'s own messages."""
        return await self._vms.log(self.id, which, tail=tail)

    async def operations(self, *, limit: int = 100) -> list[Operation]:
        """What was done with it, the newest first."""
        return await self._vms.operations.list(vm=self.id, limit=limit)

    def console(self, *, offset: int | None = None) -> Console:
        """Its serial console, from ``offset`` of its history on (the last 64 KiB by default): ``async with`` it."""
        from mica.client.console import Console

        return Console(self._vms.transport, self.id, offset)

    async def exec(
        self,
        *argv: str,
        stdin: Stdin = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
        check: bool = True,
    ) -> ExecResult:
        """Run a command in the guest to its end; ``str()`` of the result is what it printed.

        No shell is involved. ``stdin`` is text, bytes, or an asynchronous iterable of bytes; ``user`` is the guest's
        (root by default), ``timeout_s`` ends it after so many seconds. Raises ``command-failed`` when ``check`` and its
        exit status is not 0, ``timeout``, ``agent-unavailable``, ``too-large`` (more than 64 MiB of output).
        """
        from mica.client import execs

        stream = self.exec_stream(*argv, stdin=stdin is not None, env=env, user=user, cwd=cwd, timeout_s=timeout_s)
        result = await execs.run(stream, stdin)
        return result.check() if check else result

    def exec_stream(
        self,
        *argv: str,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
    ) -> ExecStream:
        """Run a command and read it live: ``async with`` it. With ``stdin`` it is fed by ``write``."""
        from mica.client import execs

        spec = execs.make_spec(argv, stdin=stdin, env=env, user=user, cwd=cwd, timeout_s=timeout_s)
        return execs.ExecStream(self._vms.transport, self.id, spec)

    async def copy_in(self, source: Path | str, dest: str, *, on_progress: OnBytes | None = None) -> CopyReport:
        """Copy a file or directory of this host into the guest: into ``dest`` where that is a directory, else as it.

        ``on_progress`` gets the bytes so far and the bytes in all. Raises ``not-found``, ``invalid``, ``corrupt``,
        ``agent-unavailable``; then nothing of it is in the guest.
        """
        from mica.client import files

        async def is_directory(path: str) -> bool:
            return (await self.exec("test", "-d", path, check=False)).exit_code == 0

        return await files.copy_in(
            self._vms.transport, self.id, Path(source), dest, is_directory=is_directory, on_progress=on_progress
        )

    async def copy_out(self, path: str, dest: Path | str, *, on_progress: OnBytes | None = None) -> CopyReport:
        """Copy a file or directory of the guest to this host: into ``dest`` where that is a directory, else as it.

        Raises as :meth:`copy_in`; then nothing of it is here. What a guest sends is unpacked as hostile input.
        """
        from mica.client import files

        return await files.copy_out(self._vms.transport, self.id, path, Path(dest), on_progress=on_progress)
