from __future__ import annotations

from typing import Any

import httpx
import pytest

from mica.engine.definition import NoParams
from mica.engine.operations.snapshot_create import Take
from mica.model.views import SnapshotRestore, SnapshotSet, VmFork
from tests.api.conftest import TOKEN, connect
from tests.api.fake_engine import MAKER, FakeEngine
from tests.api.test_vms import create

SNAPSHOTS = "/v1/vms/web/snapshots"


@pytest.fixture
async def web(http: httpx.AsyncClient) -> dict[str, Any]:
    """A running VM ``web`` with the snapshot ``clean``."""
    await create(http, name="web", start=True)
    await http.post(SNAPSHOTS, json={"name": "clean"})
    await http.post("/v1/templates", json={"vm": "web", "name": "golden"})
    found: dict[str, Any] = (await http.get(f"{SNAPSHOTS}/clean")).json()
    return found


async def test_taking_one_answers_202_with_what_came_of_it(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await create(http, name="web", start=True)
    reply = await http.post(SNAPSHOTS, json={"name": "clean", "quiesce": True}, headers={"Idempotency-Key": "k1"})
    assert reply.status_code == 202, reply.text
    operation = reply.json()
    assert reply.headers["location"] == f"/v1/operations/{operation['id']}"
    assert operation["target"].startswith("vm/")
    assert set(operation["result"]) == {"id", "pause_s", "changed"}
    assert engine.submitted[-1] == (*("snapshot.create", "web", Take(name="clean", quiesce=True), MAKER, None, "k1"),)
    again = await http.post(SNAPSHOTS, json={"name": "clean", "quiesce": True}, headers={"Idempotency-Key": "k1"})
    assert again.json()["id"] == operation["id"]
    nameless = await http.post(SNAPSHOTS)
    assert nameless.status_code == 202


async def test_why_a_snapshot_is_made_is_not_the_readers_to_say(http: httpx.AsyncClient) -> None:
    await create(http, name="web")
    reply = await http.post(SNAPSHOTS, json={"kind": "fork"})
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid")


async def test_it_is_found_by_name_by_id_and_by_its_beginning(http: httpx.AsyncClient, web: dict[str, Any]) -> None:
    id_ = web["snapshot"]["id"]
    for ref in ("clean", id_, id_[:8]):
        reply = await http.get(f"{SNAPSHOTS}/{ref}")
        assert reply.json() == web
        assert reply.headers["etag"] == f'"{web["generation"]}"'
    missing = await http.get(f"{SNAPSHOTS}/{id_[:7]}")
    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")
    await create(http, name="other")
    assert (await http.get(f"/v1/vms/other/snapshots/{id_}")).status_code == 404


async def test_lists_leave_out_where_forks_began_unless_asked(http: httpx.AsyncClient, web: dict[str, Any]) -> None:
    await http.post("/v1/vms/web/fork")
    for path in ("/v1/snapshots", SNAPSHOTS):
        names = [v["snapshot"]["name"] for v in (await http.get(path)).json()["items"]]
        assert names == ["clean"]
        everything = (await http.get(path, params={"all": "true"})).json()["items"]
        assert [v["snapshot"]["kind"] for v in everything] == ["user", "fork"]
    unknown = await http.get("/v1/snapshots", params={"forks": "true"})
    assert (unknown.status_code, unknown.json()["code"]) == (400, "invalid")


@pytest.mark.parametrize(
    ("method", "path", "body", "verb", "params"),
    [
        ("PATCH", "", {"name": "fresh", "protected": True}, "snapshot.set", SnapshotSet(name="fresh", protected=True)),
        ("DELETE", "", None, "snapshot.delete", NoParams()),
        ("POST", "/verify", None, "snapshot.verify", NoParams()),
    ],
)
async def test_verbs_on_a_snapshot_name_it_by_its_id(
    http: httpx.AsyncClient,
    engine: FakeEngine,
    web: dict[str, Any],
    method: str,
    path: str,
    body: Any,
    verb: str,
    params: Any,
) -> None:
    now = web["generation"]
    reply = await http.request(method, f"{SNAPSHOTS}/clean{path}", json=body, headers={"If-Match": f'"{now + 1}"'})
    assert (reply.status_code, reply.json()["code"]) == (412, "generation-conflict")
    reply = await http.request(method, f"{SNAPSHOTS}/clean{path}", json=body, headers={"If-Match": f'"{now}"'})
    assert reply.status_code == 202, reply.text
    assert engine.submitted[-1] == (verb, web["snapshot"]["id"], params, MAKER, now, "")
    assert reply.json()["target"] == f"snapshot/{web['snapshot']['id']}"
    missing = await http.request(method, f"{SNAPSHOTS}/nothing{path}", json=body)
    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")


async def test_a_change_needs_a_body_that_it_knows(http: httpx.AsyncClient, web: dict[str, Any]) -> None:
    bodies: list[Any] = [{"nme": "x"}, {"protected": "yes"}, {"name": 3}, []]
    for body in bodies:
        reply = await http.patch(f"{SNAPSHOTS}/clean", json=body)
        assert (reply.status_code, reply.json()["code"]) == (400, "invalid"), body


async def test_restore_hands_on_what_was_asked(
    http: httpx.AsyncClient, engine: FakeEngine, web: dict[str, Any]
) -> None:
    reply = await http.post(f"{SNAPSHOTS}/clean/restore", json={"keep": False, "memory": False})
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"] == f"/v1/operations/{reply.json()['id']}"
    assert engine.asked[-1] == ("restore", "web", "clean", SnapshotRestore(keep=False, memory=False), MAKER)
    assert (await http.get("/v1/vms/web")).json()["observed"]["state"] == "stopped"
    assert (await http.post(f"{SNAPSHOTS}/clean/restore")).status_code == 202
    assert engine.asked[-1][3] == SnapshotRestore()


async def test_a_fork_answers_with_an_operation_for_each_copy(
    http: httpx.AsyncClient, engine: FakeEngine, web: dict[str, Any]
) -> None:
    reply = await http.post("/v1/vms/web/fork", json={"count": 3, "name": "w"})
    assert reply.status_code == 202, reply.text
    accepted = reply.json()
    assert accepted["freeze"]["verb"] == "snapshot.create"
    assert [operation["target_name"] for operation in accepted["operations"]] == ["w-1", "w-2", "w-3"]
    copy = (await http.get("/v1/vms/w-2")).json()
    assert f"vm/{copy['id']}" == accepted["operations"][1]["target"]
    assert copy["forked_from"] == "web"
    of_snapshot = (await http.post("/v1/vms/web/fork", json={"snapshot": "clean"})).json()
    assert of_snapshot["freeze"] is None
    assert engine.asked[-1] == ("fork", "web", "clean", VmFork(snapshot="clean"), MAKER)
    assert (await http.get(f"{SNAPSHOTS}/clean")).json()["forks"] == ["web-fork-1"]
    for body, status in (({"count": 101}, 400), ({"count": 0}, 400), ({"copies": 2}, 400), ({"snapshot": "x"}, 404)):
        assert (await http.post("/v1/vms/web/fork", json=body)).status_code == status, body


ROUTES = [
    ("GET", "/v1/snapshots"),
    ("GET", SNAPSHOTS),
    ("POST", SNAPSHOTS),
    ("GET", f"{SNAPSHOTS}/clean"),
    ("PATCH", f"{SNAPSHOTS}/clean"),
    ("DELETE", f"{SNAPSHOTS}/clean"),
    ("POST", f"{SNAPSHOTS}/clean/verify"),
    ("POST", f"{SNAPSHOTS}/clean/restore"),
    ("POST", "/v1/vms/web/fork"),
    ("GET", "/v1/templates"),
    ("GET", "/v1/templates/golden"),
    ("PATCH", "/v1/templates/golden"),
    ("DELETE", "/v1/templates/golden"),
    ("POST", "/v1/templates/golden/verify"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_nobody_may_do_any_of_it_without_being_somebody(
    app: Any, engine: FakeEngine, web: dict[str, Any], method: str, path: str
) -> None:
    before = (len(engine.submitted), len(engine.asked), dict(engine.shelf))
    async with connect(app, None) as stranger:
        assert (await stranger.request(method, path)).status_code == 401
        wrong = await stranger.request(method, path, headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401
        assert (len(engine.submitted), len(engine.asked), dict(engine.shelf)) == before
        known = await stranger.request(
            method,
            path,
            json={"protected": True} if method == "PATCH" else None,
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        assert known.status_code in (200, 202), known.text
