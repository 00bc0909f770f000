"""The event stream, over a real connection where a stream must end, straight into the application where it need not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from mica.api.events import EventStream, format_event
from mica.api.lifetime import Lifetime
from mica.model.errors import Code, MicaError
from mica.model.views import Event
from tests.api.fake_engine import FakeEngine


def parse(text: str) -> list[dict[str, str]]:
    """Server-sent events as a browser reads them; comments are dropped."""
    out = []
    for block in text.split("\n\n"):
        pairs = [line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")]
        if pairs:
            out.append({pair[0]: pair[1] for pair in pairs})
    return out


async def read(
    http: httpx.AsyncClient, lifetime: Lifetime, engine: FakeEngine, url: str, headers: dict[str, str] | None = None
) -> tuple[httpx.Response, list[dict[str, str]]]:
    """Everything that the stream tells until it has caught up and the server closes it."""

    async def close() -> None:
        async with asyncio.timeout(5):
            while engine.listeners == 0:
                await asyncio.sleep(0.001)
        async with engine.happened:  # the listener waits for more: it has told all there was
            lifetime.closing.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(close())
        reply = await http.get(url, headers=headers or {})
    assert engine.listeners == 0
    return reply, parse(reply.text)


async def test_events_resume_after_the_revision_given(
    http: httpx.AsyncClient, engine: FakeEngine, lifetime: Lifetime
) -> None:
    await http.post("/v1/vms", json={"name": "a"})
    seen = engine.now
    await http.post("/v1/vms", json={"name": "b"})
    reply, events = await read(http, lifetime, engine, f"/v1/events?since={seen}")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"
    assert events[0] == {"retry": "1000", "id": str(seen)}
    assert [(e["id"], e["event"]) for e in events[1:]] == [(str(seen + 1), "vm"), (str(seen + 2), "operation")]
    data = json.loads(events[1]["data"])
    assert data["revision"] == seen + 1
    assert data["object"]["name"] == "b"


async def test_last_event_id_wins_over_since(http: httpx.AsyncClient, engine: FakeEngine, lifetime: Lifetime) -> None:
    for name in ("a", "b"):
        await http.post("/v1/vms", json={"name": name})
    reply, events = await read(http, lifetime, engine, "/v1/events?since=0", {"Last-Event-ID": str(engine.now - 1)})
    assert reply.status_code == 200
    assert [e["id"] for e in events[1:]] == [str(engine.now)]


async def test_without_since_events_begin_now(http: httpx.AsyncClient, engine: FakeEngine, lifetime: Lifetime) -> None:
    await http.post("/v1/vms", json={"name": "a"})
    _, events = await read(http, lifetime, engine, "/v1/events")
    assert events == [{"retry": "1000", "id": str(engine.now)}]


async def test_a_revision_that_is_no_longer_kept_is_410(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await http.post("/v1/vms", json={"name": "a"})
    engine.oldest = engine.now
    reply = await http.get("/v1/events?since=0")
    assert reply.status_code == 410
    assert reply.json()["code"] == "gone"
    assert engine.listeners == 0


async def test_a_revision_of_the_future_is_410_because_it_belongs_to_another_home(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/events?since=1000000")
    assert reply.status_code == 410
    assert "1000000" in reply.json()["detail"]


@pytest.mark.parametrize("value", ["seven", "-1", "1.5", "9" * 30])
async def test_a_last_event_id_that_is_no_revision_is_refused(http: httpx.AsyncClient, value: str) -> None:
    reply = await http.get("/v1/events", headers={"Last-Event-ID": value})
    assert reply.status_code == 400


async def test_silence_is_broken_by_pings_and_nothing_is_lost_by_them(engine: FakeEngine) -> None:
    stream = EventStream(engine.events(None), 1, ping_s=0.01)
    await stream.open(verdict=False)
    chunks = stream.chunks()
    assert (await anext(chunks)).startswith(b"retry:")
    assert await anext(chunks) == b": ping\n\n"
    assert await anext(chunks) == b": ping\n\n"
    await engine.tell("vm", "x", None)
    assert await anext(chunks) == format_event(Event(revision=2, kind="vm", id="x"))
    await chunks.aclose()
    assert engine.listeners == 0


@pytest.mark.parametrize(("code", "raises"), [(Code.GONE, False), (Code.CORRUPT, True)])
async def test_a_reader_that_was_too_slow_is_ended_and_a_fault_is_not_hidden(code: Code, raises: bool) -> None:
    async def events() -> AsyncIterator[Event]:
        yield Event(revision=1, kind="vm", id="x")
        raise MicaError(code, "you were too slow", hint="list again")

    stream = EventStream(events(), 0)
    await stream.open(verdict=True)
    chunks = []
    with pytest.raises(MicaError) if raises else contextlib.nullcontext():
        async for chunk in stream.chunks():
            chunks.append(chunk)  # noqa: PERF401 - what came before the fault counts
    assert len(chunks) == 2


async def test_a_stream_that_is_never_read_lets_go_of_the_engine(engine: FakeEngine) -> None:
    stream = EventStream(engine.events(None), 1)
    await stream.open(verdict=False)
    await asyncio.sleep(0)
    await stream.close()
    assert engine.listeners == 0
