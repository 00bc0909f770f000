"""Snapshots that are taken by themselves."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, post
from litestar.params import JSONBody, PathParameter

from mica.api.params import EngineDep, TermsDep, submit
from mica.engine.definition import NoParams
from mica.model.operation import Operation
from mica.model.schedule import ScheduleCreate, SchedulePage, ScheduleView

SCHEDULES = "/v1/schedules"
Ref = Annotated[str, PathParameter(description="A schedule's id, or its beginning (8 characters)")]


@get(SCHEDULES, summary="List schedules of snapshots", operation_id="schedule_list")
async def list_all(engine: EngineDep) -> SchedulePage:
    return await engine.schedules()


@post(SCHEDULES, status_code=202, summary="Have snapshots taken by themselves", operation_id="schedule_create")
async def create(engine: EngineDep, terms: TermsDep, data: JSONBody[ScheduleCreate]) -> Response[Operation]:
    return await submit(engine, "schedule.create", "", data, terms)


@get(SCHEDULES + "/{schedule:str}", summary="Show a schedule", operation_id="schedule_show")
async def show(engine: EngineDep, schedule: Ref) -> ScheduleView:
    return await engine.schedule(schedule)


@delete(SCHEDULES + "/{schedule:str}", status_code=202, summary="Delete a schedule", operation_id="schedule_delete")
async def remove(engine: EngineDep, terms: TermsDep, schedule: Ref) -> Response[Operation]:
    found = await engine.schedule(schedule)
    return await submit(engine, "schedule.delete", found.schedule.id, NoParams(), terms)


HANDLERS = [list_all, create, show, remove]
