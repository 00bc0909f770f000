"""The snapshots of the engine in memory, and its forks."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from typing import Any

import msgspec

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import Code, MicaError, Problem, invalid, not_found
from mica.model.operation import Actor, Operation, OperationState
from mica.model.schedule import Schedule, ScheduleCreate, SchedulePage, ScheduleView, check_every, parse_keep
from mica.model.snapshot import HISTORY, MachineBuild, MemoryState, Snapshot, SnapshotKind, SnapshotState
from mica.model.units import MIB, Bytes
from mica.model.views import (
    ForkAccepted,
    SnapshotPage,
    SnapshotRestore,
    SnapshotSet,
    SnapshotView,
    VmClone,
    VmFork,
    VmView,
)
from mica.model.vm import NicRuntime, Publish, VmState, check_name
from tests.api.fake_guests import NOW, FakeGuests

replace = msgspec.structs.replace
BUILD = MachineBuild(qemu="7.2.0", machine="pc-q35-7.2", cpu="max", accelerator="tcg")
LIVE = (VmState.RUNNING, VmState.PAUSED)


class FakeSnapshots(FakeGuests, ABC):
    """``shelf`` are the snapshots by id, oldest first. Every second copy of a VM named ``barren`` comes to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf: dict[str, SnapshotView] = {}
        self.plans: dict[str, ScheduleView] = {}
        self.asked: list[tuple[str, str, str, msgspec.Struct, Actor]] = []

    @abstractmethod
    async def tell(self, kind: str, id_: str, object_: Any) -> int: ...

    @abstractmethod
    async def _job(self, operation: Operation) -> Operation: ...

    @abstractmethod
    async def _put(self, view: VmView) -> VmView: ...

    # -- reads -------------------------------------------------------------------------------------------------

    async def snapshots(self, vm: str = "", *, forks: bool = False) -> SnapshotPage:
        vm_id = (await self.vm(vm)).id if vm else ""
        items = [
            self._now(view)
            for view in self.shelf.values()
            if (not vm or view.snapshot.vm_id == vm_id)
            and view.snapshot.kind in (*HISTORY, *((SnapshotKind.FORK,) if forks else ()))
        ]
        return SnapshotPage(revision=1, items=tuple(items))

    async def snapshot(self, vm: str, ref: str) -> SnapshotView:
        vm_id = (await self.vm(vm)).id
        for view in self.shelf.values():
            snapshot = view.snapshot
            if snapshot.vm_id == vm_id and (ref == snapshot.name or (len(ref) >= 8 and snapshot.id.startswith(ref))):
                return self._now(view)
        raise not_found("snapshot", ref, hint=f"`mica snapshot list {vm}` shows them")

    async def templates(self) -> SnapshotPage:
        found = [view for view in self.shelf.values() if view.snapshot.kind is SnapshotKind.TEMPLATE]
        return SnapshotPage(revision=1, items=tuple(map(self._now, sorted(found, key=lambda v: v.snapshot.name))))

    async def template(self, ref: str) -> SnapshotView:
        for view in (await self.templates()).items:
            if ref == view.snapshot.name or (len(ref) >= 8 and view.snapshot.id.startswith(ref)):
                return view
        raise not_found("template", ref, hint="`mica template list` shows them")

    def _now(self, view: SnapshotView) -> SnapshotView:
        vms = [vm for vm in self.machines.values() if vm.snapshot == view.snapshot.id]
        return replace(
            view,
            current=any(vm.id == view.snapshot.vm_id for vm in vms),
            forks=tuple(sorted(vm.name for vm in vms if vm.id != view.snapshot.vm_id)),
        )

    # -- verbs -------------------------------------------------------------------------------------------------

    async def _shelve(self, vm: VmView, take: Take) -> SnapshotView:
        mine = take.kind is SnapshotKind.TEMPLATE
        here = {
            view.snapshot.name
            for view in self.shelf.values()
            if (view.snapshot.kind is SnapshotKind.TEMPLATE) is mine and (mine or view.snapshot.vm_id == vm.id)
        }
        name = check_name(take.name or f"snapshot-{len(here) + 1}", "snapshot name")
        if name in here:
            raise MicaError(Code.EXISTS, f"VM {vm.name} has a snapshot {name} already", hint="choose another name")
        memory = take.memory and vm.observed.state in LIVE
        snapshot = Snapshot(
            id=str(uuid.uuid4()),
            vm_id=vm.id,
            vm_name=vm.name,
            name=name,
            spec=vm.spec,
            created_at=NOW + len(self.shelf),
            created_by="root",
            kind=take.kind,
            state=SnapshotState.COMPLETE,
            parent=vm.snapshot,
            memory=MemoryState(ram="r", devices="d", build=BUILD) if memory else None,
            description=take.description,
            pause_s=0.09 if memory else None,
        )
        view = SnapshotView(
            snapshot=snapshot,
            generation=0,
            size=Bytes(50 * MIB),
            memory=memory,
            current=False,
            complete=True,
            verified_at=NOW,
        )
        await self._put_snapshot(view)
        if take.kind in HISTORY:
            await self._put(replace(self.machines[vm.id], snapshot=snapshot.id))
        return view

    async def _put_snapshot(self, view: SnapshotView) -> None:
        id_ = view.snapshot.id
        self.shelf[id_] = replace(view, generation=await self.tell("snapshot", id_, view))

    async def _snapshot_create(self, target: str, params: Take, _if_match: int | None) -> tuple[str, str, Any]:
        vm = await self.vm(target)
        if vm.observed.state is VmState.TRASHED:
            raise MicaError(Code.STATE_CONFLICT, f"VM {vm.name} is trashed", hint="restore it from the trash first")
        snapshot = (await self._shelve(vm, params)).snapshot
        return vm.id, vm.name, {"id": snapshot.id, "pause_s": snapshot.pause_s, "changed": 3 * MIB}

    async def _snapshot_set(self, id_: str, params: SnapshotSet, _if_match: int | None) -> tuple[str, str]:
        view = self.shelf[id_]
        fields = {name: value for name, value in msgspec.structs.asdict(params).items() if value is not None}
        if params.name is not None:
            check_name(params.name, "snapshot name")
        await self._put_snapshot(replace(view, snapshot=replace(view.snapshot, **fields)))
        return id_, self._title(id_)

    async def _snapshot_delete(self, id_: str, _params: NoParams, _if_match: int | None) -> tuple[str, str]:
        title = self._title(id_)
        if self.shelf[id_].snapshot.protected:
            raise MicaError(Code.PROTECTED, f"snapshot {title} is protected", hint="unprotect it first")
        del self.shelf[id_]
        await self.tell("snapshot", id_, None)
        return id_, title

    async def _snapshot_verify(self, id_: str, _params: NoParams, _if_match: int | None) -> tuple[str, str, Any]:
        damaged = dict(enumerate(self.shelf[id_].damaged))
        return id_, self._title(id_), {"parts": 3, "damaged": {str(part): why for part, why in damaged.items()}}

    def _title(self, id_: str) -> str:
        snapshot = self.shelf[id_].snapshot
        return snapshot.name if snapshot.kind is SnapshotKind.TEMPLATE else f"{snapshot.vm_name}/{snapshot.name}"

    def _operation(self, verb: str, vm: VmView, params: msgspec.Struct, by: Actor, **more: Any) -> Operation:
        return Operation(
            id=str(uuid.uuid4()),
            verb=verb,
            target=f"vm/{vm.id}",
            target_name=vm.name,
            params=msgspec.to_builtins(params),
            by=by,
            created_at=NOW,
            started_at=NOW + 0.1,
            ended_at=NOW + 0.28,
            **{"state": OperationState.SUCCEEDED, **more},
        )

    async def restore(
        self, vm: str, snapshot: str, params: SnapshotRestore, *, by: Actor, idempotency_key: str = ""
    ) -> Operation:
        self.asked.append(("restore", vm, snapshot, params, by))
        view, found = await self.vm(vm), await self.snapshot(vm, snapshot)
        if params.keep:
            await self._shelve(view, Take(name=f"before-restore-{len(self.shelf)}", kind=SnapshotKind.SAFETY))
        state = VmState.RUNNING if found.memory and params.memory else VmState.STOPPED
        back = replace(self.machines[view.id], snapshot=found.snapshot.id, spec=found.snapshot.spec)
        await self._put(replace(back, observed=replace(view.observed, state=state)))
        return await self._job(self._operation("snapshot.restore", view, params, by))

    async def fork(self, vm: str, params: VmFork, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        self.asked.append(("fork", vm, params.snapshot, params, by))
        view, freeze = await self.vm(vm), None
        if not 1 <= params.count <= 100:
            raise invalid(f"{params.count} copies; a fork makes 1 to 100", hint="ask again for more")
        if params.snapshot:
            base = await self.snapshot(vm, params.snapshot)
        elif view.observed.state not in LIVE:
            raise MicaError(Code.STATE_CONFLICT, f"VM {view.name} does not run", hint="start it, or name a snapshot")
        else:
            base = await self._shelve(view, Take(name=f"fork-{len(self.shelf)}", kind=SnapshotKind.FORK))
            freeze = await self._job(self._operation("snapshot.create", view, params, by))
        stem = check_name(params.name or f"{view.name}-fork", "VM name")
        names = [stem] if params.count == 1 and params.name else [f"{stem}-{n + 1}" for n in range(params.count)]
        return ForkAccepted(
            operations=tuple([await self._copy(view, base.snapshot, name, params, by) for name in names]),
            freeze=freeze,
        )

    async def _schedule_create(
        self, _target: str, params: ScheduleCreate, _if_match: int | None
    ) -> tuple[str, str, dict[str, Any]]:
        if bool(params.vm) == bool(params.label):
            raise invalid("a schedule is for one VM or for a label", hint="give one of the two")
        view = await self.vm(params.vm) if params.vm else None
        made = Schedule(
            id=str(uuid.uuid4()),
            every_s=check_every(params.every_s),
            keep=parse_keep(params.keep),
            created_at=NOW,
            created_by="root",
            vm_id=view.id if view else "",
            label=params.label,
            memory=params.memory,
        )
        target = view.name if view else params.label
        self.plans[made.id] = ScheduleView(
            schedule=made, generation=1, target=target, keep=params.keep, next_at=NOW, vms=(), snapshots=0
        )
        return made.id, target, {"id": made.id}

    async def _schedule_delete(
        self, target: str, _params: msgspec.Struct, _if_match: int | None
    ) -> tuple[str, str, dict[str, Any]]:
        return target, self.plans.pop(target).target, {}

    async def schedules(self) -> SchedulePage:
        return SchedulePage(revision=1, items=tuple(self.plans.values()))

    async def schedule(self, ref: str) -> ScheduleView:
        for id_, view in self.plans.items():
            if id_.startswith(ref):
                return view
        raise not_found("schedule", ref, hint="`mica snapshot schedules` lists them all")

    async def clone(self, vm: str, params: VmClone, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        self.asked.append(("clone", vm, params.snapshot, params, by))
        view, freeze = await self.vm(vm), None
        if params.snapshot:
            base = await self.snapshot(vm, params.snapshot)
        elif view.observed.state in LIVE:
            raise MicaError(Code.STATE_CONFLICT, f"VM {view.name} runs", hint="fork it, or stop it first")
        else:
            base = await self._shelve(view, Take(name=f"fork-{len(self.shelf)}", kind=SnapshotKind.FORK))
            freeze = await self._job(self._operation("snapshot.create", view, params, by))
        name = check_name(params.name or f"{view.name}-clone-1", "VM name")
        made = await self._copy(view, base.snapshot, name, params, by, VmState.STOPPED)
        return ForkAccepted(operations=(made,), freeze=freeze)

    async def _copy(
        self,
        vm: VmView,
        base: Snapshot,
        name: str,
        params: VmFork | VmClone,
        by: Actor,
        state: VmState = VmState.RUNNING,
    ) -> Operation:
        if any(known.name == name for known in self.machines.values()):
            raise MicaError(Code.EXISTS, f"there is a VM {name!r} already", hint="choose another name")
        nic = NicRuntime(name="net0", address="10.0.2.15", publish=(Publish(80, 40000 + len(self.machines)),))
        copy = replace(
            vm,
            id=str(uuid.uuid4()),
            name=name,
            snapshot=base.id if base.kind is not SnapshotKind.FORK else "",
            forked_from=vm.name,
            nics=(nic,),
            observed=replace(vm.observed, state=state),
        )
        if vm.name == "barren" and len(self.machines) % 2 == 0:
            problem = Problem(Code.INSUFFICIENT_MEMORY, f"{name} needs 256 MiB", "stop something")
            return await self._job(
                self._operation("vm.create", copy, params, by, state=OperationState.FAILED, problem=problem)
            )
        return await self._job(self._operation("vm.create", await self._put(copy), params, by))
