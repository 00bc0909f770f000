"""Virtual machines."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, patch, post
from litestar.params import JSONBody, QueryParameter

from mica.api.params import After, EngineDep, Limit, TermsDep, VmRef, labels_of, submit
from mica.engine.definition import NoParams
from mica.model.operation import Operation
from mica.model.transitions import VmVerb
from mica.model.views import VmCreate, VmDelete, VmPage, VmRestore, VmSet, VmStart, VmStop, VmView

VM = "/v1/vms/{vm:str}"

# Bodies that may be left out.
NOTHING, START, STOP, RESTORE = NoParams(), VmStart(), VmStop(), VmRestore()


@get("/v1/vms", summary="List VMs", operation_id="vm_list")
async def list_vms(
    engine: EngineDep,
    after: After = "",
    limit: Limit = 100,
    trashed: Annotated[bool, QueryParameter(description="Those in the trash instead")] = False,
    label: Annotated[list[str] | None, QueryParameter(description="KEY=VALUE; given again, all must hold")] = None,
) -> VmPage:
    return await engine.vms(after=after, limit=limit, trashed=trashed, labels=labels_of(label))


@post("/v1/vms", status_code=202, summary="Create a VM", operation_id="vm_create")
async def create(engine: EngineDep, terms: TermsDep, data: JSONBody[VmCreate]) -> Response[Operation]:
    return await submit(engine, VmVerb.CREATE, "", data, terms)


@get(VM, summary="Show a VM", operation_id="vm_show")
async def show(engine: EngineDep, vm: VmRef) -> Response[VmView]:
    view = await engine.vm(vm)
    return Response(view, headers={"ETag": f'"{view.generation}"'})


@patch(VM, status_code=202, summary="Change a VM", operation_id="vm_set")
async def change(engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmSet]) -> Response[Operation]:
    return await submit(engine, VmVerb.SET, vm, data, terms)


@delete(VM, status_code=202, summary="Delete a VM", operation_id="vm_delete")
async def remove(
    engine: EngineDep,
    terms: TermsDep,
    vm: VmRef,
    purge: Annotated[bool, QueryParameter(description="At once, not into the trash")] = False,
    force: Annotated[bool, QueryParameter(description="Stop it first")] = False,
) -> Response[Operation]:
    verb = VmVerb.PURGE if purge else VmVerb.DELETE
    return await submit(engine, verb, vm, VmDelete(purge=purge, force=force), terms)


@post(f"{VM}/start", status_code=202, summary="Start a VM", operation_id="vm_start")
async def start(engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmStart] = START) -> Response[Operation]:
    return await submit(engine, VmVerb.START, vm, data, terms)


@post(f"{VM}/stop", status_code=202, summary="Stop a VM", operation_id="vm_stop")
async def stop(engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmStop] = STOP) -> Response[Operation]:
    return await submit(engine, VmVerb.STOP, vm, data, terms)


@post(f"{VM}/restart", status_code=202, summary="Stop a VM and start it again", operation_id="vm_restart")
async def restart(engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmStop] = STOP) -> Response[Operation]:
    return await submit(engine, VmVerb.RESTART, vm, data, terms)


@post(f"{VM}/pause", status_code=202, summary="Hold a VM's vCPUs", operation_id="vm_pause")
async def pause(
    engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, VmVerb.PAUSE, vm, data, terms)


@post(f"{VM}/suspend", status_code=202, summary="Put a VM's memory on disk and end it", operation_id="vm_suspend")
async def suspend(
    engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, VmVerb.SUSPEND, vm, data, terms)


@post(f"{VM}/discard", status_code=202, summary="Give up a suspended VM's memory", operation_id="vm_discard")
async def discard(
    engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, VmVerb.DISCARD, vm, data, terms)


@post(f"{VM}/resume", status_code=202, summary="Let a paused or suspended VM run on", operation_id="vm_resume")
async def resume(
    engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, VmVerb.RESUME, vm, data, terms)


@post(f"{VM}/restore", status_code=202, summary="Bring a VM back from the trash", operation_id="vm_restore")
async def restore(
    engine: EngineDep, terms: TermsDep, vm: VmRef, data: JSONBody[VmRestore] = RESTORE
) -> Response[Operation]:
    return await submit(engine, VmVerb.RESTORE, vm, data, terms)


HANDLERS = [list_vms, create, show, change, remove, start, stop, restart, pause, suspend, discard, resume, restore]
