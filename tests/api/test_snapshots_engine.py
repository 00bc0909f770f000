"""Snapshots and forks through the API, done by the engine itself on a simulated host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import structlog
from structlog.testing import LogCapture

from mica.api.app import create_app
from mica.api.auth import Access, Peer
from mica.engine.forking import clone, fork, restore
from mica.model.operation import Actor, Operation
from mica.model.views import ForkAccepted, SnapshotPage, SnapshotRestore, SnapshotView, VmClone, VmFork, VmView
from mica.testing.harness import Life
from tests.api.conftest import connect
from tests.api.fake_engine import FakeEngine
from tests.engine.worlds import create, living


class OverEngine(FakeEngine):
    """What is about VMs, operations and snapshots goes to the engine of ``life``."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._engine = life.engine

    async def submit(self, verb: str, target: str, params: msgspec.Struct, **how: Any) -> Operation:
        return await self._engine.submit(verb, target, params, **how)

    async def restore(
        self, vm: str, snapshot: str, params: SnapshotRestore, *, by: Actor, idempotency_key: str = ""
    ) -> Operation:
        return await restore(self._engine, vm, snapshot, params, by=by, idempotency_key=idempotency_key)

    async def fork(self, vm: str, params: VmFork, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        return await fork(self._engine, vm, params, by=by, idempotency_key=idempotency_key)

    async def clone(self, vm: str, params: VmClone, *, by: Actor, idempotency_key: str = "") -> ForkAccepted:
        return await clone(self._engine, vm, params, by=by, idempotency_key=idempotency_key)

    async def vm(self, ref: str) -> VmView:
        return await self._engine.views.vm(ref)

    async def operation(self, operation_id: str) -> Operation:
        return await self._engine.views.operation(operation_id)

    async def snapshots(self, vm: str = "", *, forks: bool = False) -> SnapshotPage:
        return await self._engine.views.snapshots(vm, forks=forks)

    async def templates(self) -> SnapshotPage:
        return await self._engine.views.templates()

    async def template(self, ref: str) -> SnapshotView:
        return await self._engine.views.template(ref)

    async def snapshot(self, vm: str, ref: str) -> SnapshotView:
        return await self._engine.views.snapshot(vm, ref)


class Api:
    """Requests, and what their operations became."""

    def __init__(self, life: Life, http: httpx.AsyncClient) -> None:
        self.life, self.http = life, http

    async def get(self, path: str) -> Any:
        reply = await self.http.get(path)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        reply = await self.http.request(method, path, json=body)
        return reply.status_code, reply.json()["code"]

    async def done(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The operation at its end."""
        reply = await self.http.request(method, path, json=body)
        assert reply.status_code == 202, reply.text
        await self.life.rest()
        ended: dict[str, Any] = await self.get(reply.headers["location"])
        assert ended["state"] == "succeeded", ended.get("problem")
        return ended


@asynccontextmanager
async def web() -> AsyncIterator[Api]:
    """A running VM ``web``."""
    async with living() as life:
        await create(life, "web", start=True)
        await life.advance(5.0)
        log = structlog.wrap_logger(None, processors=[LogCapture()])
        app = create_app(OverEngine(life), access=Access(uid=4242), log=log)
        async with connect(app, Peer(1, 0, 0)) as http:
            yield Api(life, http)


SNAPSHOTS = "/v1/vms/web/snapshots"


async def test_a_snapshot_through_its_life() -> None:
    async with web() as api:
        taken = await api.done("POST", SNAPSHOTS, {"name": "clean", "description": "as installed"})
        assert taken["target_name"] == "web"
        assert taken["result"]["pause_s"] is not None
        view = await api.get(f"{SNAPSHOTS}/clean")
        assert view["snapshot"]["id"] == taken["result"]["id"]
        assert (view["complete"], view["memory"], view["current"]) == (True, True, True)
        assert await api.refused("POST", SNAPSHOTS, {"name": "clean"}) == (409, "exists")
        assert await api.refused("POST", SNAPSHOTS, {"name": "Not A Name"}) == (400, "invalid")
        changed = await api.done("PATCH", f"{SNAPSHOTS}/clean", {"name": "fresh", "protected": True})
        assert changed["target"] == f"snapshot/{view['snapshot']['id']}"
        assert await api.refused("GET", f"{SNAPSHOTS}/clean") == (404, "not-found")
        assert (await api.done("POST", f"{SNAPSHOTS}/fresh/verify"))["result"]["damaged"] == {}
        assert await api.refused("DELETE", f"{SNAPSHOTS}/fresh") == (409, "protected")
        await api.done("PATCH", f"{SNAPSHOTS}/fresh", {"protected": False})
        await api.done("DELETE", f"{SNAPSHOTS}/{view['snapshot']['id']}")
        assert (await api.get("/v1/snapshots?all=true"))["items"] == []


async def test_going_back_keeps_what_was() -> None:
    async with web() as api:
        await api.done("POST", SNAPSHOTS, {"name": "clean"})
        await api.life.advance(1.0)
        await api.done("POST", "/v1/vms/web/stop", {"force": True})
        restored = await api.done("POST", f"{SNAPSHOTS}/clean/restore")
        assert restored["verb"] == "snapshot.restore"
        assert (await api.get("/v1/vms/web"))["observed"]["state"] == "running"
        kinds = [v["snapshot"]["kind"] for v in (await api.get(SNAPSHOTS))["items"]]
        assert kinds == ["user", "safety"]
        await api.done("POST", f"{SNAPSHOTS}/clean/restore", {"keep": False, "memory": False})
        assert (await api.get("/v1/vms/web"))["observed"]["state"] == "stopped"
        assert len((await api.get(SNAPSHOTS))["items"]) == 2


async def test_forks_run_and_are_named() -> None:
    async with web() as api:
        await api.done("POST", SNAPSHOTS, {"name": "clean"})
        reply = await api.http.post("/v1/vms/web/fork", json={"count": 2, "name": "w"})
        assert reply.status_code == 202, reply.text
        await api.life.rest()
        accepted = reply.json()
        assert [o["target_name"] for o in accepted["operations"]] == ["w-1", "w-2"]
        assert (await api.get(f"/v1/operations/{accepted['freeze']['id']}"))["state"] == "succeeded"
        for operation in accepted["operations"]:
            ended = await api.get(f"/v1/operations/{operation['id']}")
            assert ended["state"] == "succeeded", ended.get("problem")
            copy = await api.get(f"/v1/vms/{operation['target'].removeprefix('vm/')}")
            assert (copy["forked_from"], copy["observed"]["state"]) == ("web", "running")
        assert (await api.http.post("/v1/vms/web/fork", json={"snapshot": "clean", "name": "old"})).status_code == 202
        await api.life.rest()
        assert (await api.get(f"{SNAPSHOTS}/clean"))["forks"] == ["old"]
        assert await api.refused("POST", "/v1/vms/web/fork", {"count": 0}) == (400, "invalid")
        assert await api.refused("POST", "/v1/vms/web/fork", {"name": "w-1"}) == (409, "exists")
        assert await api.refused("POST", "/v1/vms/web/fork", {"snapshot": "nothing"}) == (404, "not-found")


async def test_a_template_through_its_life() -> None:
    async with web() as api:
        taken = await api.done("POST", "/v1/templates", {"vm": "web", "name": "golden", "description": "as installed"})
        assert (taken["verb"], taken["target_name"]) == ("snapshot.create", "web")
        view = await api.get("/v1/templates/golden")
        assert (view["snapshot"]["id"], view["snapshot"]["kind"]) == (taken["result"]["id"], "template")
        assert await api.refused("POST", "/v1/templates", {"vm": "web", "name": "golden"}) == (409, "exists")
        assert await api.refused("POST", "/v1/templates", {"vm": "nobody"}) == (404, "not-found")
        made = await api.done("POST", "/v1/vms", {"image": "golden", "name": "b", "start": True})
        copy = await api.get(f"/v1/{made['target'].replace('vm/', 'vms/')}")
        assert (copy["forked_from"], copy["observed"]["state"]) == ("golden", "running")
        larger = {"image": "golden", "start": True, "memory": 512 * 1024**2}
        assert await api.refused("POST", "/v1/vms", larger) == (400, "invalid")
        changed = await api.done("PATCH", "/v1/templates/golden", {"name": "fresh", "protected": True})
        assert changed["target"] == f"snapshot/{view['snapshot']['id']}"
        assert await api.refused("GET", "/v1/templates/golden") == (404, "not-found")
        assert (await api.done("POST", "/v1/templates/fresh/verify"))["result"]["damaged"] == {}
        assert await api.refused("DELETE", "/v1/templates/fresh") == (409, "protected")
        await api.done("PATCH", "/v1/templates/fresh", {"protected": False})
        await api.done("DELETE", f"/v1/templates/{view['snapshot']['id'][:8]}")
        assert (await api.get("/v1/templates"))["items"] == []


async def test_a_stopped_vm_is_cloned_over_http_and_a_running_one_is_not() -> None:
    async with web() as api:
        assert await api.refused("POST", "/v1/vms/web/clone") == (409, "state-conflict")
        await api.done("POST", "/v1/vms/web/stop", {"force": True})
        for body in ({"name": "linked"}, {"name": "full", "full": True}):
            reply = await api.http.post("/v1/vms/web/clone", json=body)
            assert reply.status_code == 202, reply.text
            await api.life.rest()
            seen = await api.get(f"/v1/vms/{body['name']}")
            assert (seen["observed"]["state"], seen["forked_from"]) == ("stopped", "web")
