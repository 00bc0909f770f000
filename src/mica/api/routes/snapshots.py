"""Snapshots of VMs, and forks."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, patch, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from mica.api.facade import Facade
from mica.api.params import EngineDep, Terms, TermsDep, VmRef, check_generation, submit
from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.operation import Operation
from mica.model.transitions import VmVerb
from mica.model.views import (
    ForkAccepted,
    SnapshotCreate,
    SnapshotPage,
    SnapshotRestore,
    SnapshotSet,
    SnapshotView,
    VmClone,
    VmFork,
)

SNAPSHOTS = "/v1/vms/{vm:str}/snapshots"
SNAPSHOT = SNAPSHOTS + "/{snapshot:str}"
Ref = Annotated[
    str, PathParameter(description="A snapshot's name within the VM, its id, or its beginning (8 characters)")
]
Forks = Annotated[bool, QueryParameter(name="all", description="Also the moments at which forks began")]


async def _meant(engine: Facade, vm: str, ref: str, on: Terms) -> str:
    """The id of a snapshot that has the generation which was asked for. Raises ``generation-conflict``."""
    found = await engine.snapshot(vm, ref)
    check_generation(f"snapshot {found.snapshot.name}", found.generation, on)
    return found.snapshot.id


# Bodies that may be left out.
NOTHING, CREATE, RESTORE, FORK, CLONE = NoParams(), SnapshotCreate(), SnapshotRestore(), VmFork(), VmClone()


@get("/v1/snapshots", summary="List the snapshots of all VMs", operation_id="snapshot_list_all")
async def list_all(engine: EngineDep, forks: Forks = False) -> SnapshotPage:
    return await engine.snapshots(forks=forks)


@get(SNAPSHOTS, summary="List a VM's snapshots", operation_id="snapshot_list")
async def list_of_vm(engine: EngineDep, vm: VmRef, forks: Forks = False) -> SnapshotPage:
    return await engine.snapshots(vm, forks=forks)


@post(SNAPSHOTS, status_code=202, summary="Take a snapshot of a VM", operation_id="snapshot_create")
async def create(
    engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[SnapshotCreate] = CREATE
) -> Response[Operation]:
    take = Take(name=data.name, memory=data.memory, quiesce=data.quiesce, description=data.description)
    return await submit(engine, VmVerb.SNAPSHOT, vm, take, terms)


@get(SNAPSHOT, summary="Show a snapshot", operation_id="snapshot_show")
async def show(engine: EngineDep, vm: VmRef, snapshot: Ref) -> Response[SnapshotView]:
    view = await engine.snapshot(vm, snapshot)
    return Response(view, headers={"ETag": f'"{view.generation}"'})


@patch(SNAPSHOT, status_code=202, summary="Rename, describe or protect a snapshot", operation_id="snapshot_set")
async def change(
    engine: EngineDep, terms: TermsDep, vm: VmRef, snapshot: Ref, data: JSONBody[SnapshotSet]
) -> Response[Operation]:
    return await submit(engine, "snapshot.set", await _meant(engine, vm, snapshot, terms), data, terms)


@delete(SNAPSHOT, status_code=202, summary="Delete a snapshot", operation_id="snapshot_delete")
async def remove(engine: EngineDep, terms: TermsDep, vm: VmRef, snapshot: Ref) -> Response[Operation]:
    return await submit(engine, "snapshot.delete", await _meant(engine, vm, snapshot, terms), NoParams(), terms)


@post(
    f"{SNAPSHOT}/verify",
    status_code=202,
    summary="Read all parts of a snapshot and compare",
    operation_id="snapshot_verify",
)
async def verify(
    engine: EngineDep, terms: TermsDep, vm: VmRef, snapshot: Ref, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, "snapshot.verify", await _meant(engine, vm, snapshot, terms), data, terms)


@post(f"{SNAPSHOT}/restore", status_code=202, summary="Bring a VM back to a snapshot", operation_id="snapshot_restore")
async def restore(
    engine: EngineDep, terms: TermsDep, vm: VmRef, snapshot: Ref, data: JSONBody[SnapshotRestore] = RESTORE
) -> Response[Operation]:
    operation = await engine.restore(vm, snapshot, data, by=terms.by, idempotency_key=terms.idempotency_key)
    return Response(operation, headers={"Location": f"/v1/operations/{operation.id}"})


@post("/v1/vms/{vm:str}/fork", status_code=202, summary="Make running copies of a VM", operation_id="vm_fork")
async def fork(engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmFork] = FORK) -> ForkAccepted:
    return await engine.fork(vm, data, by=terms.by, idempotency_key=terms.idempotency_key)


@post("/v1/vms/{vm:str}/clone", status_code=202, summary="Make a stopped copy of a VM", operation_id="vm_clone")
async def clone(engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmClone] = CLONE) -> ForkAccepted:
    return await engine.clone(vm, data, by=terms.by, idempotency_key=terms.idempotency_key)


HANDLERS = [list_all, list_of_vm, create, show, change, remove, verify, restore, fork, clone]
