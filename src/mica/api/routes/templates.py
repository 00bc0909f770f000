"""Templates: VMs as they were, for others to begin at."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, patch, post
from litestar.params import JSONBody, PathParameter

from mica.api.facade import Facade
from mica.api.params import EngineDep, Terms, TermsDep, check_generation, submit
from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.operation import Operation
from mica.model.snapshot import SnapshotKind
from mica.model.transitions import VmVerb
from mica.model.views import SnapshotPage, SnapshotSet, SnapshotView, TemplateCreate

TEMPLATES = "/v1/templates"
TEMPLATE = TEMPLATES + "/{template:str}"
Ref = Annotated[str, PathParameter(description="A template's name, id, or the unique beginning of one (8 characters)")]

NOTHING = NoParams()


async def _meant(engine: Facade, ref: str, on: Terms) -> str:
    """The id of a template that has the generation which was asked for. Raises ``generation-conflict``."""
    found = await engine.template(ref)
    check_generation(f"template {found.snapshot.name}", found.generation, on)
    return found.snapshot.id


@get(TEMPLATES, summary="List templates", operation_id="template_list")
async def list_all(engine: EngineDep) -> SnapshotPage:
    return await engine.templates()


@post(TEMPLATES, status_code=202, summary="Freeze a VM as a template", operation_id="template_create")
async def create(engine: EngineDep, terms: TermsDep, data: JSONBody[TemplateCreate]) -> Response[Operation]:
    take = Take(
        name=data.name,
        memory=data.memory,
        quiesce=data.quiesce,
        description=data.description,
        kind=SnapshotKind.TEMPLATE,
    )
    return await submit(engine, VmVerb.SNAPSHOT, data.vm, take, terms)


@get(TEMPLATE, summary="Show a template", operation_id="template_show")
async def show(engine: EngineDep, template: Ref) -> Response[SnapshotView]:
    view = await engine.template(template)
    return Response(view, headers={"ETag": f'"{view.generation}"'})


@patch(
    TEMPLATE,
    status_code=202,
    summary="Rename, describe or protect a template, or have VMs stand by",
    operation_id="template_set",
)
async def change(engine: EngineDep, terms: TermsDep, template: Ref, data: JSONBody[SnapshotSet]) -> Response[Operation]:
    return await submit(engine, "snapshot.set", await _meant(engine, template, terms), data, terms)


@delete(TEMPLATE, status_code=202, summary="Delete a template", operation_id="template_delete")
async def remove(engine: EngineDep, terms: TermsDep, template: Ref) -> Response[Operation]:
    return await submit(engine, "snapshot.delete", await _meant(engine, template, terms), NoParams(), terms)


@post(
    f"{TEMPLATE}/verify",
    status_code=202,
    summary="Read all parts of a template and compare",
    operation_id="template_verify",
)
async def verify(
    engine: EngineDep, terms: TermsDep, template: Ref, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, "snapshot.verify", await _meant(engine, template, terms), data, terms)


HANDLERS = [list_all, create, show, change, remove, verify]
