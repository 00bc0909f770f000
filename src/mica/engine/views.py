"""Rows put together for a reader: the shapes of :mod:`mica.model.views`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING

import msgspec

from mica.engine.damage import read_parts, vm_roots, wrong
from mica.engine.definition import Env
from mica.engine.image_views import image_views
from mica.engine.operations.vm_create import find_image
from mica.engine.records import Ledger, Versioned
from mica.engine.shelf import Shelf
from mica.model.errors import Code, MicaError, not_found
from mica.model.operation import Operation, OperationState
from mica.model.schedule import Schedule, SchedulePage, ScheduleView, format_keep
from mica.model.snapshot import HISTORY, LASTING, Part, SnapshotKind
from mica.model.views import (
    Event,
    ImagePage,
    ImageView,
    OperationPage,
    SnapshotPage,
    SnapshotView,
    VmPage,
    VmUsage,
    VmView,
)
from mica.model.vm import Vm, VmRuntime, VmStatus, pending_changes
from mica.ports.store import Compacted

if TYPE_CHECKING:
    from mica.engine.engine import Engine

replace = msgspec.structs.replace

MAX_PAGE = 1000
_TOLD = ("vm", "operation", "image", "snapshot")


class Views:
    """Read side of the engine. Nothing here writes."""

    def __init__(self, env: Env, engine: Engine) -> None:
        self._env = env
        self._records = env.records
        self._engine = engine

    def _vm_view(
        self,
        vm: Versioned[Vm],
        status: VmStatus,
        operations: tuple[str, ...],
        usage: VmUsage,
        parts: Mapping[str, Part],
    ) -> VmView:
        value, runtime = vm.value, status.runtime
        machine = runtime or status.suspended
        if runtime is None:  # what was sampled last was of a process that has ended
            usage = VmUsage(disk=usage.disk)
        pending = pending_changes(value.spec, machine.spec) if machine else ()
        return VmView(
            id=value.id,
            name=value.name,
            generation=vm.generation,
            intent=value.intent,
            spec=value.spec,
            observed=status.observed,
            labels=value.labels,
            description=value.description,
            image_name=value.image_name,
            created_at=value.created_at,
            created_by=value.created_by,
            deleted_at=value.deleted_at,
            expires_at=value.expires_at,
            pending=pending,
            running=machine.spec if machine and pending else None,
            operations=operations,
            accelerator=runtime.accelerator if runtime else "",
            process=runtime.process if runtime else None,
            nics=runtime.nics if runtime else (),
            usage=usage,
            reduced=runtime.reduced if runtime else (),
            snapshot=value.snapshot,
            forked_from=value.forked_from,
            identity=status.identity,
            damaged=wrong(parts, vm_roots(value, status)),
        )

    def _usage(self, ledger: Ledger, vm_id: str, runtime: VmRuntime | None) -> VmUsage:
        usage, promised = self._engine.sampler.usage(vm_id), ledger.reserved.get(vm_id)
        shared = self._env.ram.size(runtime.ram) if runtime is not None and runtime.ram else None
        return replace(usage, shared=shared, promised=promised.total if promised is not None else None)

    def _active(self, vm_id: str) -> tuple[str, ...]:
        return tuple(o.id for o in self._engine.waiting(vm_id))

    async def vm(self, ref: str) -> VmView:
        """One VM by name, id or the beginning of an id, with everything observed. Raises ``not-found``."""
        vm_id = await self._records.resolve_vm(ref)
        vm = await self._records.vms.need(vm_id)
        status = (await self._records.statuses.need(vm_id)).value
        usage = self._usage((await self._records.read_ledger()).value, vm_id, status.runtime)
        usage = replace(usage, disk=await self._env.volumes.usage(vm_id))
        return self._vm_view(vm, status, self._active(vm_id), usage, await read_parts(self._env))

    async def vms(
        self, *, after: str = "", limit: int = 100, trashed: bool = False, labels: dict[str, str] | None = None
    ) -> VmPage:
        """VMs in order of id; ``after`` is the ``next`` of the page before. ``trashed`` lists the trash instead."""
        if not 1 <= limit <= MAX_PAGE:
            raise MicaError(Code.INVALID, f"a page of {limit}; pages have 1 to {MAX_PAGE} items")
        revision = await self._records.store.revision()
        vms = await self._records.vms.scan(after=after)
        statuses = await self._records.statuses.scan(after=after)
        parts, ledger = await read_parts(self._env), (await self._records.read_ledger()).value
        items: list[VmView] = []
        following = ""
        for vm_id, vm in vms.items():
            if vm.value.hidden or (vm.value.deleted_at is not None) != trashed or vm_id not in statuses:
                continue
            if labels and any(vm.value.labels.get(k) != v for k, v in labels.items()):
                continue
            if len(items) == limit:
                following = items[-1].id
                break
            usage = self._usage(ledger, vm_id, statuses[vm_id].value.runtime)
            items.append(self._vm_view(vm, statuses[vm_id].value, self._active(vm_id), usage, parts))
        return VmPage(revision=revision, next=following, items=tuple(items))

    async def running(self) -> dict[str, tuple[str, VmRuntime]]:
        """Name and runtime of every VM that has a process, by id."""
        out = {}
        for vm_id, status in (await self._records.statuses.scan()).items():
            vm = await self._records.vms.get(vm_id)
            if vm is not None and not vm.value.hidden and status.value.runtime is not None:
                out[vm_id] = (vm.value.name, status.value.runtime)
        return out

    async def operation(self, operation_id: str) -> Operation:
        """One operation by id, or by its beginning (8 characters or more). Raises ``not-found``."""
        found = await self._records.operations.get(operation_id)
        if found is None and len(operation_id) >= 8:
            near = await self._records.operations.scan(after=operation_id, limit=1)
            found = next((o for id_, o in near.items() if id_.startswith(operation_id)), None)
        if found is None:
            raise not_found("operation", operation_id, hint="`mica operation list` shows those that are kept")
        return found.value

    async def operations(
        self, *, after: str = "", limit: int = 100, vm: str = "", active: bool = False
    ) -> OperationPage:
        """Operations, newest first. ``after`` is the id of the last one seen."""
        if not 1 <= limit <= MAX_PAGE:
            raise MicaError(Code.INVALID, f"a page of {limit}; pages have 1 to {MAX_PAGE} items")
        target = f"vm/{await self._records.resolve_vm(vm)}" if vm else ""
        revision = await self._records.store.revision()
        rows = [o.value for o in (await self._records.operations.scan()).values()]
        chosen = [o for o in rows if (not target or o.target == target) and (not active or not o.state.ended)]
        chosen.sort(key=lambda o: (-o.created_at, o.id))
        if after:
            seen = next((i for i, o in enumerate(chosen) if o.id == after), None)
            chosen = chosen[seen + 1 :] if seen is not None else []
        page = chosen[:limit]
        return OperationPage(revision=revision, next=page[-1].id if len(chosen) > limit else "", items=tuple(page))

    async def wait_operation(self, operation_id: str, timeout_s: float) -> Operation:
        """The operation as soon as it has ended or is stuck, or as it is after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    revision = await self._records.store.revision()
                    found = await self.operation(operation_id)
                    if found.state.ended or found.state is OperationState.STUCK:
                        return found
                    await self._records.store.wait(revision)
        except TimeoutError:
            return await self.operation(operation_id)

    async def images(self) -> ImagePage:
        revision = await self._records.store.revision()
        rows = list((await self._records.images.scan()).values())
        items = sorted(await image_views(self._env, rows), key=lambda v: (v.image.name, -v.image.created_at))
        return ImagePage(revision=revision, items=tuple(items))

    async def image(self, ref: str) -> ImageView:
        """By name or the beginning of its digest. Raises ``not-found`` naming those there are."""
        found = await find_image(self._env, ref)
        if found is None:
            raise not_found("image", ref)
        row = await self._records.images.need(found.image.digest)
        return (await image_views(self._env, [row]))[0]

    async def snapshots(self, vm: str = "", *, forks: bool = False) -> SnapshotPage:
        """All snapshots, or those of one VM, oldest first; with ``forks`` also the moments at which forks began."""
        vm_id = await self._records.resolve_vm(vm) if vm else ""
        revision = await self._records.store.revision()
        shelf = await Shelf.read(self._env)
        chosen = [
            row
            for row in shelf.rows
            if (not vm_id or row.value.vm_id == vm_id)
            and (row.value.kind in HISTORY or (forks and row.value.kind not in LASTING))
        ]
        return SnapshotPage(revision=revision, items=tuple(shelf.view(row) for row in chosen))

    async def snapshot(self, vm: str, ref: str) -> SnapshotView:
        """One snapshot of a VM by name, id or the beginning of its id. Raises ``not-found``."""
        id_ = await self._records.resolve_snapshot(await self._records.resolve_vm(vm), ref)
        row = await self._records.snapshots.need(id_)
        return (await Shelf.read(self._env)).view(row)

    async def templates(self) -> SnapshotPage:
        """All templates, by name."""
        revision = await self._records.store.revision()
        shelf = await Shelf.read(self._env)
        chosen = [row for row in shelf.rows if row.value.kind is SnapshotKind.TEMPLATE]
        chosen.sort(key=lambda row: row.value.name)
        return SnapshotPage(revision=revision, items=tuple(shelf.view(row) for row in chosen))

    async def template(self, ref: str) -> SnapshotView:
        """One template by name, id or the beginning of its id. Raises ``not-found``."""
        row = await self._records.snapshots.need(await self._records.resolve_template(ref))
        return (await Shelf.read(self._env)).view(row)

    async def schedules(self) -> SchedulePage:
        """All schedules, oldest first."""
        revision = await self._records.store.revision()
        rows = sorted((await self._records.schedules.scan()).values(), key=lambda r: (r.value.created_at, r.value.id))
        return SchedulePage(revision=revision, items=tuple([await self._schedule_view(row) for row in rows]))

    async def schedule(self, ref: str) -> ScheduleView:
        """One schedule by id or its beginning (8 characters or more). Raises ``not-found``."""
        rows = await self._records.schedules.scan()
        hits = [row for id_, row in rows.items() if id_ == ref or (len(ref) >= 8 and id_.startswith(ref))]
        if len(hits) != 1:
            raise not_found("schedule", ref, hint="`mica snapshot schedules` lists them all")
        return await self._schedule_view(hits[0])

    async def _schedule_view(self, row: Versioned[Schedule]) -> ScheduleView:
        schedule, now = row.value, self._env.clock.now()
        vms = {id_: vm.value for id_, vm in (await self._records.vms.scan()).items() if vm.value.deleted_at is None}
        covered = {id_: vm for id_, vm in vms.items() if schedule.covers(id_, vm.labels)}
        owed = any(schedule.last.get(id_, 0.0) < schedule.due(now) for id_ in covered)
        taken = [s for s in (await self._records.snapshots.scan()).values() if s.value.schedule == schedule.id]
        name = vms[schedule.vm_id].name if schedule.vm_id in vms else schedule.vm_id[:8]
        label = f"{schedule.label}={schedule.value}" if schedule.value else schedule.label
        return ScheduleView(
            schedule=schedule,
            generation=row.generation,
            target=name if schedule.vm_id else label,
            keep=format_keep(schedule.keep),
            next_at=now if owed else schedule.following(now),
            vms=tuple(sorted(vm.name for vm in covered.values())),
            snapshots=len(taken),
        )

    async def events(self, since: int | None) -> AsyncGenerator[Event, None]:
        """Changes after revision ``since`` (``None``: from now on), for ever. Raises ``gone`` when that is too old.

        Several changes of one thing within one wake-up are told once, as it is now: events say what to look at, and
        the object they carry is what looking shows.
        """
        store = self._records.store
        at = await store.revision()
        if since is not None and since > at:
            # A power cut may take back the last commits that were not durable, and their revisions are used again.
            raise MicaError(
                Code.GONE, f"there is no revision {since}, the last is {at}", hint="list everything again and follow"
            )
        at = at if since is None else since
        while True:
            try:
                changes = await store.changes(at)
            except Compacted as error:
                raise MicaError(
                    Code.GONE,
                    f"changes since revision {at} are no longer kept (the oldest is {error.oldest})",
                    hint="list everything again and follow from the revision of that list",
                ) from error
            touched: dict[tuple[str, str], int] = {}
            for change in changes:
                kind = "vm" if change.key.kind == "vm.status" else change.key.kind
                if kind in _TOLD:
                    touched.pop((kind, change.key.id), None)
                    touched[kind, change.key.id] = change.revision
            # What one commit changed is told in several events. Only the last of them carries the commit's revision:
            # a reader that is cut off before goes on from the revision below and misses nothing.
            following = iter(touched.values())
            next(following, None)
            for (kind, id_), revision in touched.items():
                after = next(following, None)
                if await self._unseen(kind, id_):
                    continue
                told = revision - 1 if after == revision else revision
                yield Event(revision=told, kind=kind, id=id_, object=await self._object(kind, id_))
            if changes:
                at = changes[-1].revision
            else:
                await store.wait(at)

    async def _unseen(self, kind: str, id_: str) -> bool:
        """Whether it is Mica's own: a VM that boots for nobody, the state that it was for."""
        if kind == "vm":
            vm = await self._records.vms.get(id_)
            return vm is not None and vm.value.hidden
        snapshot = await self._records.snapshots.get(id_) if kind == "snapshot" else None
        return snapshot is not None and snapshot.value.kind is SnapshotKind.BOOT

    async def _object(self, kind: str, id_: str) -> VmView | Operation | ImageView | SnapshotView | None:
        if kind == "operation":
            found = await self._records.operations.get(id_)
            return found.value if found else None
        if kind == "image":
            row = await self._records.images.get(id_)
            return (await image_views(self._env, [row]))[0] if row else None
        if kind == "snapshot":
            snapshot = await self._records.snapshots.get(id_)
            return (await Shelf.read(self._env)).view(snapshot) if snapshot else None
        vm, status = await self._records.vms.get(id_), await self._records.statuses.get(id_)
        if vm is None or status is None:
            return None
        return self._vm_view(
            vm,
            status.value,
            self._active(id_),
            self._usage((await self._records.read_ledger()).value, id_, status.value.runtime),
            await read_parts(self._env),
        )
