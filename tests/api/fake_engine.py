"""An engine in memory behind the API's facade: accepts verbs, keeps what they made, tells what happened.

Operations end at once, except that those on a VM named ``slow…`` stay running until :meth:`FakeEngine.finish` is
called. It refuses what the engine refuses, with the same codes, as far as the API can tell the difference.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from mica.model.doctor import DoctorReport, Finding, HostFacts, Status
from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.image import Image, ImageFile
from mica.model.operation import Actor, Operation, OperationState
from mica.model.transitions import RULES, Answer, VmVerb, answer
from mica.model.units import MIB, Bytes
from mica.model.views import (
    Event,
    HostView,
    ImageMake,
    ImagePage,
    ImageView,
    OperationPage,
    VmCreate,
    VmDelete,
    VmPage,
    VmRestore,
    VmSet,
    VmView,
)
from mica.model.vm import Power, VmObserved, VmSpec, VmState, check_labels, check_name, check_spec
from tests.api.fake_guests import NOW
from tests.api.fake_snapshots import FakeSnapshots

replace = msgspec.structs.replace
MAKER = Actor("root", "unix:uid=0")


class FakeEngine(FakeSnapshots):
    """See the module. ``oldest`` is the first revision from which events are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1
        self.oldest = 0
        self.past: list[Event] = []
        self.listeners = 0
        self.jobs: dict[str, Operation] = {}
        self.kept_images: dict[str, ImageView] = {}
        self.keys: dict[str, tuple[str, bytes]] = {}
        self.submitted: list[tuple[str, str, msgspec.Struct, Actor, int | None, str]] = []
        self.doctored: list[bool] = []

    # -- what happens ------------------------------------------------------------------------------------------

    async def tell(self, kind: str, id_: str, object_: Any) -> int:
        self.now += 1
        self.past.append(Event(revision=self.now, kind=kind, id=id_, object=msgspec.to_builtins(object_)))
        async with self.happened:
            self.happened.notify_all()
        return self.now

    async def revision(self) -> int:
        return self.now

    async def events(self, since: int | None) -> AsyncIterator[Event]:
        at = self.now if since is None else since
        if at < self.oldest:
            raise MicaError(Code.GONE, f"events before revision {self.oldest} are no longer kept", hint="list again")
        self.listeners += 1
        try:
            while True:
                for event in [e for e in self.past if e.revision > at]:
                    at = event.revision
                    yield event
                async with self.happened:
                    while self.now <= at:
                        await self.happened.wait()
        finally:
            self.listeners -= 1

    # -- verbs -------------------------------------------------------------------------------------------------

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
        if self.fail is not None:
            raise self.fail
        self.submitted.append((verb, target, params, by, if_match, idempotency_key))
        digest = msgspec.json.encode([verb, target, params])
        if idempotency_key in self.keys:
            known, before = self.keys[idempotency_key]
            if before != digest:
                raise invalid(f"the idempotency key {idempotency_key!r} was used for another request")
            return self.jobs[known]
        noun, _, what = verb.partition(".")
        act = getattr(self, f"_{noun}_{what}", None)
        done = await (act(target, params, if_match) if act else self._vm_verb(verb, target, if_match))
        found_id, name, *result = done
        operation = Operation(
            id=str(uuid.uuid4()),
            verb=verb,
            target=f"{'vm' if verb == VmVerb.SNAPSHOT else noun}/{found_id}",
            target_name=name,
            params=msgspec.to_builtins(params),
            by=by,
            state=OperationState.RUNNING if name.startswith("slow") else OperationState.SUCCEEDED,
            created_at=NOW,
            result=result[0] if result else {},
        )
        if idempotency_key:
            self.keys[idempotency_key] = (operation.id, digest)
        await self._job(operation)
        return operation

    async def _job(self, operation: Operation) -> Operation:
        self.jobs[operation.id] = operation
        await self.tell("operation", operation.id, operation)
        return operation

    async def finish(self, operation_id: str, state: OperationState = OperationState.SUCCEEDED) -> Operation:
        return await self._job(replace(self.jobs[operation_id], state=state, ended_at=NOW + 1))

    async def cancel(self, operation_id: str, *, by: Actor) -> Operation:
        operation = await self.operation(operation_id)
        if operation.state.ended:
            raise MicaError(
                Code.STATE_CONFLICT, f"operation {operation_id} has ended", hint="nothing is left to cancel"
            )
        return await self._job(replace(operation, cancel_requested=True))

    async def resolve(self, operation_id: str, how: str, *, by: Actor) -> Operation:
        operation = await self.operation(operation_id)
        if how not in ("retry", "accept"):
            raise invalid(f"cannot resolve by {how!r}", hint="use retry or accept")
        if operation.state is not OperationState.STUCK:
            raise MicaError(Code.STATE_CONFLICT, f"operation {operation_id} is not stuck")
        return await self.finish(operation.id, OperationState.FAILED)

    async def _put(self, view: VmView) -> VmView:
        revision = await self.tell("vm", view.id, view)
        self.machines[view.id] = replace(view, generation=revision)
        return self.machines[view.id]

    async def _vm_create(self, _target: str, params: VmCreate, _if_match: int | None) -> tuple[str, str]:
        origin = next((v.snapshot for v in (await self.templates()).items if v.snapshot.name == params.image), None)
        if params.image and origin is None and params.image not in self.kept_images:
            raise not_found("image", params.image, hint="`mica image list` shows them")
        name = check_name(params.name or f"{params.image or 'vm'}-{len(self.machines) + 1}", "VM name")
        if any(vm.name == name for vm in self.machines.values()):
            raise MicaError(Code.EXISTS, f"there is a VM {name!r} already", hint="choose another name")
        spec = check_spec(
            VmSpec(
                cpus=1 if params.cpus is None else params.cpus,
                memory=Bytes(256 * MIB) if params.memory is None else params.memory,
                machine=params.machine,
                disks=params.disks,
                boot=params.boot,
                cpu_limit=params.cpu_limit,
                hostname=params.hostname,
                stop_timeout_s=params.stop_timeout_s,
            )
        )
        view = VmView(
            id=str(uuid.uuid4()),
            name=name,
            generation=0,
            intent=Power.STOPPED,
            spec=spec,
            observed=VmObserved(state=VmState.RUNNING if params.start else VmState.STOPPED, since=NOW),
            labels=check_labels(params.labels),
            description=params.description,
            image_name="" if origin else params.image,
            snapshot=origin.id if origin else "",
            forked_from=origin.name if origin else "",
            created_at=NOW,
            created_by=MAKER.name,
        )
        await self._put(view)
        return view.id, name

    def _check(self, view: VmView, if_match: int | None) -> None:
        if if_match is not None and if_match != view.generation:
            raise MicaError(
                Code.GENERATION_CONFLICT,
                f"VM {view.name} is at generation {view.generation}, not {if_match}",
                hint="read it again",
            )

    def _accept(self, verb: VmVerb, view: VmView) -> bool:
        said = answer(verb, view.observed.state)
        if said is Answer.DENY:
            raise MicaError(
                Code.STATE_CONFLICT,
                f"VM {view.name} is {view.observed.state}: {verb} is not possible",
                hint=RULES[verb].hint,
            )
        return said is Answer.ACCEPT

    async def _vm_verb(self, verb: str, target: str, if_match: int | None) -> tuple[str, str, dict[str, Any]]:
        view = await self.vm(target)
        self._check(view, if_match)
        leads_to = RULES[VmVerb(verb)].leads_to
        if not self._accept(VmVerb(verb), view):
            return view.id, view.name, {"already": True}
        if leads_to is not None:
            await self._put(replace(view, observed=replace(view.observed, state=leads_to)))
        return view.id, view.name, {}

    async def _vm_set(self, target: str, params: VmSet, if_match: int | None) -> tuple[str, str]:
        view = await self.vm(target)
        self._check(view, if_match)
        self._accept(VmVerb.SET, view)
        if isinstance(params.name, str):
            check_name(params.name, "VM name")
            view = replace(view, name=params.name)
        if isinstance(params.labels, dict):
            merged = {**view.labels, **params.labels}
            view = replace(view, labels=check_labels({k: v for k, v in merged.items() if v is not None}))
        spec = {
            field: getattr(params, field)
            for field in ("cpus", "memory", "cpu_limit", "protected", "autostart", "disks", "boot", "stop_timeout_s")
            if getattr(params, field) is not msgspec.UNSET
        }
        await self._put(replace(view, spec=check_spec(replace(view.spec, **spec))))
        return view.id, view.name

    async def _vm_delete(self, target: str, params: VmDelete, if_match: int | None) -> tuple[str, str]:
        view = await self.vm(target)
        self._check(view, if_match)
        if view.spec.protected:
            raise MicaError(Code.PROTECTED, f"VM {view.name} is protected from deletion")
        if not params.force:
            self._accept(VmVerb.PURGE if params.purge else VmVerb.DELETE, view)
        if params.purge:
            del self.machines[view.id]
            await self.tell("vm", view.id, None)
        else:
            await self._put(replace(view, deleted_at=NOW, observed=replace(view.observed, state=VmState.TRASHED)))
        return view.id, view.name

    _vm_purge = _vm_delete

    async def _vm_restore(self, target: str, params: VmRestore, if_match: int | None) -> tuple[str, str]:
        view = await self.vm(target)
        self._accept(VmVerb.RESTORE, view)
        name = check_name(params.name or view.name, "VM name")
        back = replace(view.observed, state=VmState.STOPPED)
        await self._put(replace(view, name=name, deleted_at=None, observed=back))
        return view.id, name

    async def _image_make(self, _target: str, params: ImageMake, _if_match: int | None) -> tuple[str, str]:
        name = check_name(params.recipe.name, "image name")
        image = Image(
            digest="blake3:" + "a" * 64,
            name=name,
            os="test",
            created_at=NOW,
            files={"kernel": ImageFile(Bytes(10), "b" * 64)},
        )
        self.kept_images[name] = ImageView(image=image, generation=await self.tell("image", image.digest, image))
        return image.digest, name

    async def _image_delete(self, target: str, _params: msgspec.Struct, _if_match: int | None) -> tuple[str, str]:
        view = await self.image(target)
        if view.used_by:
            raise MicaError(Code.IN_USE, f"image {view.image.name} is used by {', '.join(view.used_by)}")
        del self.kept_images[view.image.name]
        await self.tell("image", view.image.digest, None)
        return view.image.digest, view.image.name

    async def _image_verify(self, target: str, _params: msgspec.Struct, _if_match: int | None) -> tuple[str, str]:
        view = await self.image(target)
        return view.image.digest, view.image.name

    # -- reads -------------------------------------------------------------------------------------------------

    async def vms(
        self, *, after: str = "", limit: int = 100, trashed: bool = False, labels: dict[str, str] | None = None
    ) -> VmPage:
        wanted = [
            view
            for id_, view in sorted(self.machines.items())
            if id_ > after
            and (view.deleted_at is not None) == trashed
            and all(view.labels.get(k) == v for k, v in (labels or {}).items())
        ]
        items = tuple(wanted[:limit])
        return VmPage(revision=self.now, items=items, next=items[-1].id if len(wanted) > limit else "")

    async def operation(self, operation_id: str) -> Operation:
        meant = [id_ for id_ in self.jobs if id_.startswith(operation_id)] if len(operation_id) >= 8 else []
        if operation_id not in self.jobs and len(meant) != 1:
            raise not_found("operation", operation_id, hint="`mica operation list` shows them")
        return self.jobs.get(operation_id) or self.jobs[meant[0]]

    async def operations(
        self, *, after: str = "", limit: int = 100, vm: str = "", active: bool = False
    ) -> OperationPage:
        wanted = list(reversed(self.jobs.values()))
        if after:
            ids = [operation.id for operation in wanted]
            if after not in ids:
                raise invalid(f"there is no operation {after!r} to go on after")
            wanted = wanted[ids.index(after) + 1 :]
        if vm:
            target = f"vm/{(await self.vm(vm)).id}"
            wanted = [operation for operation in wanted if operation.target == target]
        if active:
            wanted = [operation for operation in wanted if not operation.state.ended]
        items = tuple(wanted[:limit])
        return OperationPage(revision=self.now, items=items, next=items[-1].id if len(wanted) > limit else "")

    async def image(self, ref: str) -> ImageView:
        for view in self.kept_images.values():
            if ref in (view.image.name, view.image.digest):
                return view
        raise not_found("image", ref, hint="`mica image list` shows them")

    async def images(self) -> ImagePage:
        return ImagePage(revision=self.now, items=tuple(self.kept_images.values()))

    async def host(self) -> HostView:
        return HostView(
            hostname="test",
            version="0.1.0",
            pid=1,
            home="/nowhere",
            started_at=NOW,
            cpus=2,
            memory=Bytes(8192 * MIB),
            available=Bytes(4096 * MIB),
            reserve=Bytes(512 * MIB),
            committed=Bytes(0),
            shared=Bytes(0),
            left=8,
            vms=len(self.machines),
            running=0,
            accelerator="tcg",
            qemu="7.2.0",
        )

    async def doctor(self, *, fresh: bool = False) -> DoctorReport:
        self.doctored.append(fresh)
        facts = HostFacts(
            hostname="test",
            kernel="6.1",
            architecture="x86_64",
            boot_id="0",
            memory_host=Bytes(8192 * MIB),
            memory_total=Bytes(8192 * MIB),
            memory_available=Bytes(4096 * MIB),
        )
        return DoctorReport(findings=(Finding(id="qemu", title="QEMU", status=Status.OK, proof="ran it"),), host=facts)
