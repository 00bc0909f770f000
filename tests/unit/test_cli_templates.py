"""``mica template``, and ``mica run`` of one, against a daemon's API over an engine in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mica import Client
from mica.client.vms import make_create
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import TABLE, Code
from mica.model.snapshot import SnapshotKind
from mica.model.units import MIB, Bytes
from mica.model.views import TemplateCreate, VmCreate
from tests.unit.client_fixtures import Served, mica, served

replace = msgspec.structs.replace


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
def run(api: Served) -> Any:
    def call(*argv: str, **options: Any) -> Any:
        return mica(*argv, url=api.url, **options)

    call("vm", "create", "--name", "web", "--start")
    return call


def test_a_template_through_its_life(api: Served, run: Any) -> None:
    assert run("template", "list").err == "mica: no templates yet; make one with: mica template create VM\n"
    made = run("template", "create", "web", "golden", "--description", "as installed", "--quiesce")
    assert made.out.splitlines() == [
        "template golden is made, 50 MiB, with memory, web stood still for 90 ms",
        "try: mica run golden",
    ]
    take = Take(kind=SnapshotKind.TEMPLATE, name="golden", quiesce=True, description="as installed")
    assert api.engine.submitted[-1][:3] == ("snapshot.create", "web", take)
    assert run("template", "create", "web", "golden").status == TABLE[Code.EXISTS].exit_status
    head, line = run("template", "list").out.splitlines()
    assert head.split() == ["NAME", "VCPUS", "RAM", "SIZE", "AGE", "MEMORY", "STATE", "STANDBY", "USED", "BY", "ABOUT"]
    assert line.split()[:3] == ["golden", "1", "256"]
    assert line.split()[-5:] == ["ok", "-", "-", "as", "installed"]
    assert "as installed" in run("template", "show", "golden").out
    assert run("template", "set", "golden", "--standby", "2").out == "golden is changed\n"
    assert run("template", "list").out.splitlines()[1].split()[-7:-3] == ["ok", "0", "of", "2"]
    ((id_, view),) = api.engine.shelf.items()
    api.engine.shelf[id_] = replace(view, standing_by=1, standby_memory=Bytes(348 * MIB))
    assert "1 of 2 VMs, 348 MiB of memory promised" in run("template", "show", "golden").out
    assert run("template", "set", "golden", "--name", "fresh", "--protected").out == "fresh is changed\n"
    assert run("template", "set", "fresh").status == TABLE[Code.INVALID].exit_status
    refused = run("template", "delete", "fresh")
    assert (refused.status, refused.out) == (TABLE[Code.PROTECTED].exit_status, "")
    assert run("template", "set", "fresh", "--no-protected").status == 0
    assert run("template", "verify", "fresh").out == "fresh is whole\n"
    assert run("template", "delete", "fresh").out == "fresh is deleted\n"
    assert json.loads(run("template", "list", "--json").out) == []


def test_damage_is_told_of_a_template(api: Served, run: Any) -> None:
    run("template", "create", "web", "golden")
    ((id_, view),) = api.engine.shelf.items()
    api.engine.shelf[id_] = replace(view, damaged=("disk root: its checksum is another",))
    ended = run("template", "verify", "golden")
    assert ended.status == TABLE[Code.CORRUPT].exit_status
    assert "template golden is damaged: disk root: its checksum is another" in ended.err


def test_run_takes_a_template_where_no_image_has_that_name(api: Served, run: Any) -> None:
    run("template", "create", "web", "golden")
    ended = run("run", "golden", "--name", "b")
    assert (ended.status, ended.out.splitlines()[0]) == (0, "b is running")
    created = api.engine.submitted[-1][2]
    assert isinstance(created, VmCreate)
    assert (created.image, created.start) == ("golden", True)
    assert run("template", "list").out.splitlines()[1].split()[-3:] == ["1", "VM", "-"]
    unknown = run("run", "nothing")
    assert unknown.status == TABLE[Code.NOT_FOUND].exit_status
    assert "built on first use" in unknown.err


async def test_the_client_runs_templates(api: Served) -> None:
    async with Client(api.url) as client:
        await client.vms.create(make_create("", name="web", start=True))
        await client.templates.create(TemplateCreate(vm="web", name="golden"))
        vm = await client.run("golden")
        assert vm.view.forked_from == "golden"
        assert [view.forks for view in await client.templates.list()] == [(vm.name,)]
