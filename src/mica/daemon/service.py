"""The engine as the API sees it: requests, views, guests, consoles, the host, each passed to who does it."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from mica import __version__
from mica.daemon.settings import Settings
from mica.engine import standbys
from mica.engine.engine import Engine
from mica.engine.forking import clone, fork, restore
from mica.engine.image_views import booted_size
from mica.engine.promises import left, shared
from mica.guest.copy import Copies, CopySummary
from mica.guest.sessions import ExecSessions
from mica.host.facts import read_facts
from mica.model.doctor import DoctorReport
from mica.model.errors import Code, MicaError, invalid
from mica.model.exec import ExecSpec, ExecView
from mica.model.operation import Actor, Operation
from mica.model.schedule import SchedulePage, ScheduleView
from mica.model.transitions import LIVE
from mica.model.units import Bytes
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
from mica.model.vm import AgentState, VmRuntime, VmState
from mica.qemu.command_line import Sockets
from mica.qemu.console import Consoles
from mica.qemu.hypervisor import QemuHypervisor

log = structlog.get_logger()

MAX_LOG = 16 * 1024 * 1024


class Service:
    """Implements :class:`mica.api.facade.Facade` over one running engine."""

    def __init__(
        self,
        *,
        engine: Engine,
        hypervisor: QemuHypervisor,
        consoles: Consoles,
        execs: ExecSessions,
        copies: Copies,
        settings: Settings,
        doctor: Callable[[bool], Awaitable[DoctorReport]],
        started_at: float,
    ) -> None:
        self._engine = engine
        self._views = engine.views
        self._records = engine.env.records
        self._hypervisor = hypervisor
        self._consoles = consoles
        self._execs = execs
        self._copies = copies
        self._settings = settings
        self._doctor = doctor
        self._started_at = started_at

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────

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
        return await self._engine.submit(
            verb, target, params, by=by, if_match=if_match, idempotency_key=idempotency_key
        )

    async def restore(
        self, vm: str, snapshot: str, params: SnapshotRestore, *, by: Actor, idempotency_key: str = ""
    ) -> Operation:
        return await restore(self._engine, vm, snapshot, params, by=by, idempotency_key=idempotency_key)

    async def fork(self, vm: str, params: VmFork, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        return await fork(self._engine, vm, params, by=by, idempotency_key=idempotency_key)

    async def clone(self, vm: str, params: VmClone, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        return await clone(self._engine, vm, params, by=by, idempotency_key=idempotency_key)

    async def cancel(self, operation_id: str, *, by: Actor) -> Operation:
        return await self._engine.cancel((await self._views.operation(operation_id)).id, by=by)

    async def resolve(self, operation_id: str, how: str, *, by: Actor) -> Operation:
        return await self._engine.resolve((await self._views.operation(operation_id)).id, how, by=by)

    async def schedules(self) -> SchedulePage:
        return await self._views.schedules()

    async def schedule(self, ref: str) -> ScheduleView:
        return await self._views.schedule(ref)

    # ── views ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def vm(self, ref: str) -> VmView:
        return await self._views.vm(ref)

    async def vms(
        self, *, after: str = "", limit: int = 100, trashed: bool = False, labels: dict[str, str] | None = None
    ) -> VmPage:
        return await self._views.vms(after=after, limit=limit, trashed=trashed, labels=labels)

    async def operation(self, operation_id: str) -> Operation:
        return await self._views.operation(operation_id)

    async def operations(
        self, *, after: str = "", limit: int = 100, vm: str = "", active: bool = False
    ) -> OperationPage:
        return await self._views.operations(after=after, limit=limit, vm=vm, active=active)

    async def image(self, ref: str) -> ImageView:
        return await self._views.image(ref)

    async def images(self) -> ImagePage:
        return await self._views.images()

    async def snapshots(self, vm: str = "", *, forks: bool = False) -> SnapshotPage:
        return await self._views.snapshots(vm, forks=forks)

    async def snapshot(self, vm: str, ref: str) -> SnapshotView:
        return await self._views.snapshot(vm, ref)

    async def templates(self) -> SnapshotPage:
        return await self._views.templates()

    async def template(self, ref: str) -> SnapshotView:
        return await self._views.template(ref)

    async def host(self) -> HostView:
        capacity = self._engine.env.host.capacity()
        ledger = (await self._records.read_ledger()).value
        hidden = await standbys.giving_way(self._engine.env)
        rows = (await self._records.statuses.scan()).items()
        statuses = [status.value.observed.state for vm_id, status in rows if vm_id not in hidden]
        found = self._hypervisor.found
        return HostView(
            hostname=read_facts().hostname,
            version=__version__,
            pid=os.getpid(),
            home=str(self._settings.home),
            started_at=self._started_at,
            cpus=capacity.cpus,
            memory=capacity.memory,
            available=capacity.available,
            reserve=Bytes(self._engine.env.policy.reserve),
            committed=Bytes(sum(r.total for r in ledger.reserved.values())),
            shared=Bytes((await shared(self._engine.env, ledger)).resident),
            left=(await left(self._engine.env)).least,
            vms=len(statuses),
            running=sum(state in LIVE for state in statuses),
            accelerator=found.accelerator.value if found else "",
            qemu=found.build.version if found else "",
            booted=await booted_size(self._engine.env),
            booted_limit=Bytes(self._engine.env.policy.boot_space),
        )

    async def doctor(self, *, fresh: bool = False) -> DoctorReport:
        return await self._doctor(fresh)

    async def revision(self) -> int:
        return await self._records.store.revision()

    def events(self, since: int | None) -> AsyncIterator[Event]:
        return self._views.events(since)

    # ── console and logs ──────────────────────────────────────────────────────────────────────────────────────────

    async def _serial(self, vm_id: str) -> Path | None:
        """The VM's serial socket while it runs."""
        row = await self._records.statuses.get(vm_id)
        if row is None or row.value.runtime is None or row.value.observed.state not in LIVE:
            return None
        return Sockets(Path(row.value.runtime.run_dir)).serial

    async def console_follow(self, vm: str, offset: int | None) -> AsyncIterator[tuple[int, bytes]]:
        vm_id = await self._records.resolve_vm(vm)
        async for piece in self._consoles.follow(vm_id, functools.partial(self._serial, vm_id), offset):
            yield piece

    async def console_write(self, vm: str, data: bytes) -> None:
        vm_id = await self._records.resolve_vm(vm)
        if await self._serial(vm_id) is None:
            raise MicaError(
                Code.STATE_CONFLICT, f"VM {vm} does not run, so its console takes no input", hint="start it first"
            )
        await self._consoles.write(vm_id, functools.partial(self._serial, vm_id), data)

    async def log(self, vm: str, which: str, tail: int) -> bytes:
        """The end of the ``console`` or ``qemu`` log, at most ``tail`` bytes."""
        if not 0 < tail <= MAX_LOG:
            raise invalid(f"a tail of {tail} bytes is not between 1 and {MAX_LOG}")
        vm_id = await self._records.resolve_vm(vm)
        if which == "console":
            return self._consoles.tail(vm_id, tail)
        if which != "qemu":
            raise invalid(f"there is no log {which!r}", hint="console or qemu")
        file = self._settings.log_dir / vm_id / "qemu.log"
        if not file.exists():
            return b""
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - tail))
            return stream.read(tail)

    # ── commands in guests ────────────────────────────────────────────────────────────────────────────────────────

    async def _guest(self, ref: str) -> tuple[str, str, VmRuntime]:
        """Id, name and runtime of a VM whose guest can be spoken with. Raises ``state-conflict`` with the way out."""
        vm_id = await self._records.resolve_vm(ref)
        name = (await self._records.vms.need(vm_id)).value.name
        status = (await self._records.statuses.need(vm_id)).value
        state = status.observed.state
        if status.runtime is None or state is not VmState.RUNNING:
            held = state in (VmState.PAUSED, VmState.SUSPENDED)
            way = f"`mica vm resume {name}`" if held else f"`mica vm start {name}`"
            raise MicaError(Code.STATE_CONFLICT, f"VM {name} is {state}; commands and files need it to run", hint=way)
        if status.observed.agent is AgentState.ABSENT:
            raise MicaError(
                Code.AGENT_UNAVAILABLE,
                f"VM {name} has no port for a guest agent",
                hint="its console works without one: `mica vm console`",
            )
        return vm_id, name, status.runtime

    async def exec_start(self, vm: str, spec: ExecSpec, *, by: Actor) -> ExecView:
        vm_id, name, runtime = await self._guest(vm)
        record = await self._execs.start(vm_id, name, runtime, spec)
        log.info("exec", vm=name, exec=record.id, by=by.name, source=by.source, command=spec.argv[0])
        return record.view()

    async def execs(self, vm: str) -> list[ExecView]:
        return [record.view() for record in self._execs.of(await self._records.resolve_vm(vm))]

    async def exec_state(self, vm: str, exec_id: str) -> ExecView:
        return self._execs.get(await self._records.resolve_vm(vm), exec_id).view()

    async def exec_wait(self, vm: str, exec_id: str) -> ExecView:
        return (await self._execs.wait(await self._records.resolve_vm(vm), exec_id)).view()

    async def exec_follow(
        self, vm: str, exec_id: str, stream: Literal["stdout", "stderr"], offset: int
    ) -> AsyncIterator[bytes]:
        vm_id = await self._records.resolve_vm(vm)
        async for piece in self._execs.follow(vm_id, exec_id, stream, offset):
            yield piece

    async def exec_stdin(self, vm: str, exec_id: str, data: bytes | None) -> None:
        await self._execs.stdin(await self._records.resolve_vm(vm), exec_id, data)

    async def exec_kill(self, vm: str, exec_id: str, signal: int) -> None:
        await self._execs.kill(await self._records.resolve_vm(vm), exec_id, signal)

    async def copy_in(self, vm: str, dest: str, tar: AsyncIterator[bytes], *, by: Actor, size: int = 0) -> CopySummary:
        vm_id, name, runtime = await self._guest(vm)
        log.info("copy in", vm=name, by=by.name, source=by.source, path=dest)
        return await self._copies.copy_in(vm_id, name, runtime, dest, tar, size=size)

    async def copy_out(self, vm: str, path: str, *, by: Actor) -> AsyncIterator[bytes]:
        vm_id, name, runtime = await self._guest(vm)
        log.info("copy out", vm=name, by=by.name, source=by.source, path=path)
        async with aclosing(self._copies.copy_out(vm_id, name, runtime, path)) as pieces:
            async for piece in pieces:
                yield piece
