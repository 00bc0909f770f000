from __future__ import annotations

import asyncio

import httpx
import msgspec
import pytest
from litestar import Litestar

from mica.api.auth import Peer
from mica.api.lifetime import Lifetime
from mica.model.errors import Code, Problem
from mica.model.operation import Actor, Operation, OperationState
from tests.api.conftest import connect
from tests.api.fake_engine import FakeEngine


async def slow(http: httpx.AsyncClient, name: str = "slow-web") -> str:
    return str((await http.post("/v1/vms", json={"name": name})).json()["id"])


async def test_waiting_returns_as_soon_as_the_operation_has_ended(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    id_ = await slow(http)
    assert (await http.get(f"/v1/operations/{id_}")).json()["state"] == "running"
    waiting = asyncio.create_task(http.get(f"/v1/operations/{id_}?wait=60"))
    async with asyncio.timeout(5):
        while engine.listeners == 0:
            await asyncio.sleep(0.001)
        await engine.finish(id_)
        assert (await waiting).json()["state"] == "succeeded"
    assert engine.listeners == 0


async def test_waiting_returns_for_an_operation_that_needs_an_operator(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    id_ = await slow(http)
    await engine.finish(id_, OperationState.STUCK)
    async with asyncio.timeout(5):
        assert (await http.get(f"/v1/operations/{id_}?wait=60")).json()["state"] == "stuck"


async def test_waiting_ends_with_its_time_and_shows_the_operation_as_it_is(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    id_ = await slow(http)
    assert (await http.get(f"/v1/operations/{id_}?wait=0.05")).json()["state"] == "running"
    assert engine.listeners == 0


async def test_waiting_ends_when_the_server_closes(
    http: httpx.AsyncClient, engine: FakeEngine, lifetime: Lifetime
) -> None:
    id_ = await slow(http)
    waiting = asyncio.create_task(http.get(f"/v1/operations/{id_}?wait=60"))
    async with asyncio.timeout(5):
        while engine.listeners == 0:
            await asyncio.sleep(0.001)
        lifetime.closing.set()
        assert (await waiting).json()["state"] == "running"


async def test_waiting_survives_events_being_forgotten(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    id_ = await slow(http)
    engine.oldest = 10_000
    assert (await http.get(f"/v1/operations/{id_}?wait=60")).json()["state"] == "running"


async def test_lists_are_newest_first_and_filter(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    first, second = await slow(http, "web"), await slow(http, "slow-db")
    page = (await http.get("/v1/operations?limit=1")).json()
    assert [item["id"] for item in page["items"]] == [second]
    rest = (await http.get(f"/v1/operations?after={page['next']}")).json()
    assert [item["id"] for item in rest["items"]] == [first]
    active = (await http.get("/v1/operations?active=true")).json()
    assert [item["id"] for item in active["items"]] == [second]
    web = (await http.get("/v1/operations?vm=web")).json()
    assert [item["id"] for item in web["items"]] == [first]
    assert (await http.get("/v1/operations?vm=nobody")).status_code == 404


async def test_cancel_and_resolve(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    id_ = await slow(http)
    reply = await http.post(f"/v1/operations/{id_}/cancel")
    assert (reply.status_code, reply.json()["cancel_requested"]) == (200, True)
    assert (await http.post(f"/v1/operations/{id_}/resolve", json={"how": "accept"})).status_code == 409
    await engine.finish(id_, OperationState.STUCK)
    assert (await http.post(f"/v1/operations/{id_}/resolve", json={"how": "guess"})).status_code == 400
    assert (await http.post(f"/v1/operations/{id_}/resolve", json={"how": "accept"})).json()["state"] == "failed"
    assert (await http.post(f"/v1/operations/{id_}/cancel")).status_code == 409


@pytest.mark.parametrize("page", ["", "/cancel", "/resolve"])
async def test_an_operation_that_is_not_there(http: httpx.AsyncClient, page: str) -> None:
    method = "POST" if page else "GET"
    reply = await http.request(method, f"/v1/operations/none{page}", json={"how": "retry"} if "res" in page else None)
    assert reply.status_code == 404


async def test_images_are_made_shown_verified_and_deleted(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    reply = await http.post("/v1/images", json={"recipe": {"kind": "micro", "suite": "trixie"}})
    assert reply.status_code == 202
    assert engine.submitted[-1][2].recipe.suite == "trixie"  # type: ignore[attr-defined]
    shown = await http.get("/v1/images/micro")
    digest = shown.json()["image"]["digest"]
    assert shown.headers["etag"] == f'"{shown.json()["generation"]}"'
    assert (await http.get(f"/v1/images/{digest}")).json() == shown.json()
    assert [i["image"]["name"] for i in (await http.get("/v1/images")).json()["items"]] == ["micro"]
    assert (await http.post("/v1/images/micro/verify")).status_code == 202
    assert (await http.delete("/v1/images/micro")).status_code == 202
    for method, page in (("GET", ""), ("DELETE", ""), ("POST", "/verify")):
        gone = await http.request(method, f"/v1/images/micro{page}")
        assert (gone.status_code, gone.json()["code"]) == (404, "not-found")


async def test_the_root_is_the_host_and_the_revision(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    root = (await http.get("/v1")).json()
    host = (await http.get("/v1/host")).json()
    assert root == {**host, "revision": engine.now}
    assert (root["version"], root["home"]) == ("0.1.0", "/nowhere")


async def test_doctor_proves_anew_when_asked(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    report = (await http.get("/v1/host/doctor")).json()
    assert report["findings"][0]["status"] == "ok"
    await http.get("/v1/host/doctor?fresh=true")
    assert engine.doctored == [False, True]


async def test_metrics_count_vms_operations_and_requests(http: httpx.AsyncClient) -> None:
    for name in ("a", "b", "slow-c"):
        await http.post("/v1/vms", json={"name": name})
    await http.post("/v1/vms/a/start")
    await http.delete("/v1/vms/b")
    await http.get("/nowhere")
    reply = await http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = reply.text.splitlines()
    assert 'mica_vms{state="running"} 1.0' in lines
    assert 'mica_vms{state="stopped"} 1.0' in lines
    assert 'mica_vms{state="trashed"} 1.0' in lines
    assert 'mica_vms{state="paused"} 0.0' in lines
    assert 'mica_operations{state="running",verb="vm.create"} 1.0' in lines
    assert 'mica_request_duration_seconds_count{method="POST",route="/v1/vms",status="2xx"} 3.0' in lines
    assert 'mica_request_duration_seconds_count{method="",route="",status="4xx"} 1.0' in lines
    resident = next(line for line in lines if line.startswith("mica_daemon_resident_bytes"))
    assert float(resident.split()[1]) > 1_000_000


async def test_metrics_count_what_has_ended(http: httpx.AsyncClient, lifetime: Lifetime) -> None:
    start = Operation(
        id="1",
        verb="vm.start",
        target="vm/1",
        target_name="a",
        params={},
        by=Actor("me"),
        state=OperationState.SUCCEEDED,
        created_at=100.0,
        started_at=101.0,
        ended_at=104.0,
    )
    full = Problem(Code.INSUFFICIENT_DISK, "full")
    metrics = lifetime.metrics
    metrics.operation(start)
    metrics.operation(msgspec.structs.replace(start, started_at=None))
    metrics.operation(msgspec.structs.replace(start, state=OperationState.FAILED, problem=full))
    lines = (await http.get("/metrics")).text.splitlines()
    assert 'mica_operation_duration_seconds_count{outcome="succeeded",verb="vm.start"} 2.0' in lines
    assert 'mica_operation_duration_seconds_sum{outcome="succeeded",verb="vm.start"} 7.0' in lines
    assert 'mica_operation_duration_seconds_bucket{le="2.5",outcome="failed",verb="vm.start"} 0.0' in lines
    assert 'mica_operation_duration_seconds_bucket{le="5.0",outcome="failed",verb="vm.start"} 1.0' in lines
    assert 'mica_operation_problems_total{code="insufficient-disk",verb="vm.start"} 1.0' in lines


async def test_the_description_is_served(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["openapi"].startswith("3.1")


PAGES = [
    "/v1",
    "/v1/host",
    "/v1/vms",
    "/v1/operations",
    "/v1/images",
    "/v1/events",
    "/metrics",
    "/v1/openapi.json",
    "/no",
]


@pytest.mark.parametrize("page", PAGES)
async def test_nothing_but_health_is_shown_to_strangers(app: Litestar, page: str) -> None:
    async with connect(app, Peer(1, 65534, 65534)) as stranger:
        reply = await stranger.get(page)
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
        assert (await stranger.get("/v1/health")).status_code == 200
    async with connect(app, None) as over_tcp:
        assert (await over_tcp.get(page)).status_code == 401
        assert (await over_tcp.get("/v1/health")).status_code == 401


async def test_more_than_can_be_served_at_a_time_is_told_to_come_back(
    app: Litestar, engine: FakeEngine, http: httpx.AsyncClient
) -> None:
    id_ = await slow(http)
    gate = app.asgi_handler
    gate.limit = 2  # type: ignore[attr-defined]
    waiting = [asyncio.create_task(http.get(f"/v1/operations/{id_}?wait=60")) for _ in range(2)]
    async with asyncio.timeout(5):
        while engine.listeners < 2:
            await asyncio.sleep(0.001)
        reply = await http.get("/v1/vms")
        assert (reply.status_code, reply.json()["code"]) == (503, "busy")
        assert reply.headers["retry-after"] == "1"
        await engine.finish(id_)
        assert [(await task).status_code for task in waiting] == [200, 200]
    assert (await http.get("/v1/vms")).status_code == 200
