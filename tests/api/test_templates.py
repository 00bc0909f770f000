"""Templates over HTTP: what is sent, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx

from mica.engine.operations.snapshot_create import Take
from mica.model.snapshot import SnapshotKind
from tests.api.conftest import TOKEN, connect
from tests.api.fake_engine import MAKER, FakeEngine
from tests.api.test_vms import create

TEMPLATES = "/v1/templates"


async def test_what_is_asked_for_is_what_is_taken(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await create(http, name="web", start=True)
    body = {"vm": "web", "name": "golden", "memory": False, "quiesce": True, "description": "d"}
    reply = await http.post(TEMPLATES, json=body, headers={"Idempotency-Key": "k1"})
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"] == f"/v1/operations/{reply.json()['id']}"
    take = Take(kind=SnapshotKind.TEMPLATE, name="golden", memory=False, quiesce=True, description="d")
    assert engine.submitted[-1] == ("snapshot.create", "web", take, MAKER, None, "k1")
    again = await http.post(TEMPLATES, json=body, headers={"Idempotency-Key": "k1"})
    assert again.json()["id"] == reply.json()["id"]
    assert (await http.post(TEMPLATES, json={"name": "golden"})).status_code == 400
    assert (await http.get("/v1/vms/web/snapshots?all=true")).json()["items"] == []


async def test_a_template_that_has_changed_is_not_changed_again_unseen(http: httpx.AsyncClient) -> None:
    await create(http, name="web")
    await http.post(TEMPLATES, json={"vm": "web", "name": "golden"})
    seen = await http.get(f"{TEMPLATES}/golden")
    etag = {"If-Match": seen.headers["etag"]}
    changed = await http.patch(f"{TEMPLATES}/golden", json={"description": "d"}, headers=etag)
    assert changed.status_code == 202
    for stale in (
        await http.patch(f"{TEMPLATES}/golden", json={"description": "e"}, headers=etag),
        await http.delete(f"{TEMPLATES}/golden", headers=etag),
    ):
        assert (stale.status_code, stale.json()["code"]) == (412, "generation-conflict")


async def test_nobody_makes_one_without_being_somebody(app: Any, http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await create(http, name="web")
    before = len(engine.submitted)
    async with connect(app, None) as stranger:
        assert (await stranger.post(TEMPLATES, json={"vm": "web"})).status_code == 401
        assert len(engine.submitted) == before
        known = {"Authorization": f"Bearer {TOKEN}"}
        assert (await stranger.post(TEMPLATES, json={"vm": "web"}, headers=known)).status_code == 202
