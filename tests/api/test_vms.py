from __future__ import annotations

from typing import Any

import httpx
import pytest

from mica.model.transitions import VmVerb
from mica.model.views import VmDelete, VmRestore, VmStart, VmStop
from tests.api.fake_engine import FakeEngine

MIB = 1024 * 1024


async def create(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await http.post("/v1/vms", json=fields)
    assert reply.status_code == 202, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def test_create_answers_202_with_the_operation_and_where_to_follow_it(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/vms", json={"name": "web", "cpus": 2, "memory": 512 * MIB})
    assert reply.status_code == 202
    operation = reply.json()
    assert reply.headers["location"] == f"/v1/operations/{operation['id']}"
    assert operation["verb"] == "vm.create"
    assert operation["by"] == {"name": "root", "source": "unix:uid=0"}
    shown = await http.get(reply.headers["location"])
    assert shown.json() == operation


async def test_show_has_the_generation_as_etag_and_takes_names_and_beginnings_of_ids(http: httpx.AsyncClient) -> None:
    await create(http, name="web")
    reply = await http.get("/v1/vms/web")
    assert reply.status_code == 200
    view = reply.json()
    assert reply.headers["etag"] == f'"{view["generation"]}"'
    assert (await http.get(f"/v1/vms/{view['id'][:8]}")).json() == view


async def test_list_pages_and_filters(http: httpx.AsyncClient) -> None:
    for name in ("a", "b", "c"):
        await create(http, name=name, labels={"tier": "db" if name == "a" else "web"})
    first = (await http.get("/v1/vms", params={"limit": 2})).json()
    assert len(first["items"]) == 2
    rest = (await http.get("/v1/vms", params={"after": first["next"]})).json()
    assert len(rest["items"]) == 1
    assert rest["next"] == ""
    web = (await http.get("/v1/vms?label=tier=web")).json()
    assert sorted(vm["name"] for vm in web["items"]) == ["b", "c"]
    none = (await http.get("/v1/vms?label=tier=web&label=other=1")).json()
    assert none["items"] == []
    await http.delete("/v1/vms/a")
    trashed = (await http.get("/v1/vms", params={"trashed": "true"})).json()
    assert [vm["name"] for vm in trashed["items"]] == ["a"]


@pytest.mark.parametrize(
    ("method", "path", "body", "verb", "params"),
    [
        ("POST", "start", None, VmVerb.START, VmStart()),
        ("POST", "start", {"paused": True}, VmVerb.START, VmStart(paused=True)),
        ("POST", "stop", {"force": True, "timeout_s": 5}, VmVerb.STOP, VmStop(force=True, timeout_s=5.0)),
        ("POST", "restart", None, VmVerb.RESTART, VmStop()),
        ("POST", "pause", None, VmVerb.PAUSE, None),
        ("POST", "resume", {}, VmVerb.RESUME, None),
        ("POST", "suspend", None, VmVerb.SUSPEND, None),
        ("DELETE", "?force=true", None, VmVerb.DELETE, VmDelete(force=True)),
        ("DELETE", "?purge=true&force=true", None, VmVerb.PURGE, VmDelete(purge=True, force=True)),
    ],
)
async def test_each_verb_reaches_the_engine_with_its_parameters(
    http: httpx.AsyncClient, engine: FakeEngine, method: str, path: str, body: Any, verb: VmVerb, params: Any
) -> None:
    await create(http, name="web", start=path != "start")
    url = f"/v1/vms/web{path}" if path.startswith("?") else f"/v1/vms/web/{path}"
    reply = await http.request(method, url, json=body)
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"].startswith("/v1/operations/")
    said = engine.submitted[-1]
    assert (said[0], said[1]) == (verb, "web")
    if params is not None:
        assert said[2] == params


async def test_restore_takes_a_new_name(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await create(http, name="web")
    assert (await http.delete("/v1/vms/web")).status_code == 202
    reply = await http.post("/v1/vms/web/restore", json={"name": "web2"})
    assert reply.status_code == 202
    assert engine.submitted[-1][2] == VmRestore(name="web2")
    assert (await http.get("/v1/vms/web2")).json()["observed"]["state"] == "stopped"


async def test_patch_leaves_alone_what_is_left_out(http: httpx.AsyncClient) -> None:
    await create(http, name="web", cpus=3, labels={"a": "1", "b": "2"})
    reply = await http.patch("/v1/vms/web", json={"labels": {"a": None, "c": "3"}})
    assert reply.status_code == 202
    view = (await http.get("/v1/vms/web")).json()
    assert view["spec"]["cpus"] == 3
    assert view["labels"] == {"b": "2", "c": "3"}


async def test_if_match_is_the_generation(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await create(http, name="web")
    etag = (await http.get("/v1/vms/web")).headers["etag"]
    assert (await http.patch("/v1/vms/web", json={"cpus": 2}, headers={"If-Match": etag})).status_code == 202
    stale = await http.patch("/v1/vms/web", json={"cpus": 3}, headers={"If-Match": etag})
    assert stale.status_code == 412
    assert stale.json()["code"] == "generation-conflict"
    anyhow = await http.patch("/v1/vms/web", json={"cpus": 3}, headers={"If-Match": "*"})
    assert anyhow.status_code == 202
    assert engine.submitted[-1][4] is None


@pytest.mark.parametrize("value", ["7", 'W/"7"', '"seven"', "", '"7", "8"'])
async def test_a_malformed_if_match_is_refused_before_anything_is_done(
    http: httpx.AsyncClient, engine: FakeEngine, value: str
) -> None:
    await create(http, name="web")
    before = len(engine.submitted)
    reply = await http.patch("/v1/vms/web", json={"cpus": 2}, headers={"If-Match": value})
    assert reply.status_code == 400
    assert "If-Match" in reply.json()["detail"]
    assert len(engine.submitted) == before


async def test_an_idempotency_key_makes_a_request_happen_once(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    headers = {"Idempotency-Key": "key-1"}
    first = await http.post("/v1/vms", json={"name": "web"}, headers=headers)
    again = await http.post("/v1/vms", json={"name": "web"}, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert len(engine.machines) == 1
    other = await http.post("/v1/vms", json={"name": "other"}, headers=headers)
    assert other.status_code == 400


@pytest.mark.parametrize("key", ["", "x" * 65, "with space", "tab\tbed"])
async def test_a_malformed_idempotency_key_is_refused(http: httpx.AsyncClient, key: str) -> None:
    reply = await http.post("/v1/vms", json={"name": "web"}, headers={"Idempotency-Key": key})
    assert reply.status_code == 400
    assert "Idempotency-Key" in reply.json()["detail"]


async def test_a_name_that_is_taken_is_a_conflict(http: httpx.AsyncClient) -> None:
    await create(http, name="web")
    reply = await http.post("/v1/vms", json={"name": "web"})
    assert reply.status_code == 409
    assert reply.json()["code"] == "exists"


async def test_a_verb_that_the_state_forbids_is_a_conflict_with_a_way_out(http: httpx.AsyncClient) -> None:
    await create(http, name="web")
    reply = await http.post("/v1/vms/web/pause")
    assert reply.status_code == 409
    assert reply.json()["code"] == "state-conflict"
    assert reply.json()["hint"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/vms/nobody"),
        ("PATCH", "/v1/vms/nobody"),
        ("DELETE", "/v1/vms/nobody"),
        *[("POST", f"/v1/vms/nobody/{verb}") for verb in ("start", "stop", "restart", "pause", "resume", "restore")],
    ],
)
async def test_a_vm_that_is_not_there_is_404_for_every_route(http: httpx.AsyncClient, method: str, path: str) -> None:
    reply = await http.request(method, path, json={} if method != "GET" else None)
    assert reply.status_code == 404
    assert reply.json()["code"] == "not-found"
    assert "nobody" in reply.json()["detail"]
