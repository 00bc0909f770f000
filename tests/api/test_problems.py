"""Everything that goes wrong leaves as problem details, names the thing, and tells nothing of the inside."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from structlog.testing import LogCapture

from mica.model.errors import TABLE, Code, MicaError
from tests.api.fake_engine import FakeEngine


def problem(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = reply.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["type"] == f"/errors/{code}"
    assert body["title"]
    assert body["detail"]
    return body


@pytest.mark.parametrize("code", list(Code))
async def test_each_code_has_its_status_and_title(http: httpx.AsyncClient, engine: FakeEngine, code: Code) -> None:
    engine.fail = MicaError(code, "it needs 4.2 GiB", hint="stop build-3", retryable=True, details={"need": 42})
    body = problem(await http.get("/v1/vms/web"), TABLE[code].http_status, code)
    assert body["title"] == TABLE[code].title
    assert (body["detail"], body["hint"], body["retryable"]) == ("it needs 4.2 GiB", "stop build-3", True)
    assert body["details"] == {"need": 42}


async def test_busy_says_when_to_come_back(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail = MicaError(Code.BUSY, "the inbox of VM web is full", retryable=True)
    reply = await http.post("/v1/vms/web/start")
    problem(reply, 503, "busy")
    assert reply.headers["retry-after"] == "1"


async def test_details_that_json_cannot_say_are_told_as_text(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail = MicaError(Code.CORRUPT, "damaged", details={"path": object()})
    assert "object" in problem(await http.get("/v1/vms/web"), 422, "corrupt")["details"]["path"]


async def test_an_unexpected_exception_tells_its_id_and_nothing_else(
    http: httpx.AsyncClient, engine: FakeEngine, lines: LogCapture
) -> None:
    engine.fail = ZeroDivisionError("secret /var/lib/mica/store.db")
    reply = await http.get("/v1/vms/web")
    body = problem(reply, 500, "internal")
    assert "secret" not in reply.text
    assert "ZeroDivision" not in reply.text
    request_id = reply.headers["x-request-id"]
    assert body["details"] == {"request_id": request_id}
    assert request_id in body["detail"]
    (line,) = lines.entries
    assert line["request_id"] == request_id
    assert line["exc_info"] is engine.fail
    assert line["log_level"] == "error"


@pytest.mark.parametrize(
    ("body", "named", "allowed"),
    [
        ({"nmae": "web"}, "nmae", "name"),
        ({"disks": [{"name": "a", "size": 1048576, "sise": 1}]}, "disks.0.sise", "size"),
        ({"nics": [{"publish": [{"guest_port": 80, "port": 1}]}]}, "nics.0.publish.0.port", "guest_port"),
    ],
)
async def test_an_unknown_field_is_named_with_the_ones_there_are(
    http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], named: str, allowed: str
) -> None:
    said = problem(await http.post("/v1/vms", json=body), 400, "invalid")
    assert repr(named) in said["detail"]
    assert said["details"]["field"] == named
    assert allowed in said["details"]["allowed"]
    assert allowed in said["hint"]
    assert engine.submitted == []


@pytest.mark.parametrize("recipe", ["micro", "debian", "import"])
async def test_an_unknown_field_of_a_recipe_is_named(http: httpx.AsyncClient, recipe: str) -> None:
    body = {"recipe": {"kind": recipe, "name": "x", "path": "/x", "siut": "trixie"}}
    if recipe != "import":
        del body["recipe"]["path"]
    said = problem(await http.post("/v1/images", json=body), 400, "invalid")
    assert said["details"]["field"] == "recipe.siut"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"cpus": "2"}, ["cpus", "int", "str"]),
        ({"cpus": 1.5}, ["cpus", "int", "float"]),
        ({"name": None}, ["name", "str", "null"]),
        ({"disks": [{"name": "a"}]}, ["disks[0]", "size"]),
        ({"start": "true"}, ["start", "bool"]),
        ([], ["array"]),
        ("text", ["str"]),
    ],
)
async def test_a_value_of_the_wrong_kind_is_named(http: httpx.AsyncClient, body: Any, words: list[str]) -> None:
    said = problem(await http.post("/v1/vms", json=body), 400, "invalid")
    for word in words:
        assert word in said["detail"]


@pytest.mark.parametrize(
    ("url", "body", "field", "allowed"),
    [
        ("/v1/vms", {"machine": "pc"}, "machine", ["q35", "minimal"]),
        ("/v1/vms", {"disks": [{"name": "a", "size": 1048576, "format": "vmdk"}]}, "disks.0.format", ["qcow2", "raw"]),
        ("/v1/images", {"recipe": {"kind": "arch"}}, "recipe.kind", ["micro", "debian", "import"]),
    ],
)
async def test_an_unknown_word_is_named_with_the_ones_there_are(
    http: httpx.AsyncClient, url: str, body: Any, field: str, allowed: list[str]
) -> None:
    said = problem(await http.post(url, json=body), 400, "invalid")
    assert said["details"]["field"] == field
    assert sorted(said["details"]["allowed"]) == sorted(allowed)
    assert allowed[0] in said["hint"]


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000, b'{"name": "\xed\xa0\x80"}', b"nul"])
async def test_what_is_no_json_is_refused(http: httpx.AsyncClient, raw: bytes) -> None:
    said = problem(await http.post("/v1/vms", content=raw), 400, "invalid")
    assert "JSON" in said["detail"]


async def test_a_missing_body_is_named(http: httpx.AsyncClient) -> None:
    said = problem(await http.post("/v1/vms"), 400, "invalid")
    assert said["detail"] == "the request has no body"


async def test_a_page_that_is_not_there(http: httpx.AsyncClient) -> None:
    said = problem(await http.get("/v2/vms"), 404, "not-found")
    assert "/v2/vms" in said["detail"]


async def test_a_method_that_a_page_does_not_take_names_those_it_does(http: httpx.AsyncClient) -> None:
    reply = await http.put("/v1/vms/web", json={})
    said = problem(reply, 405, "invalid")
    assert reply.headers["allow"] == "GET, PATCH, DELETE"
    assert "GET, PATCH, DELETE" in said["hint"]


async def test_a_body_above_1_mib_is_413_whether_its_length_is_told_or_not(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100_000

    big = json.dumps({"name": "web", "description": "x" * (1024 * 1024)})
    for reply in (await http.post("/v1/vms", content=big), await http.post("/v1/vms", content=chunks())):
        said = problem(reply, 413, "too-large")
        assert said["details"]["limit"] == 1024 * 1024
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/v1/vms?limit=0", "limit"),
        ("/v1/vms?limit=1001", "limit"),
        ("/v1/vms?limit=many", "limit"),
        ("/v1/vms?trashed=perhaps", "trashed"),
        ("/v1/vms?label=novalue", "novalue"),
        ("/v1/vms?trashd=true", "trashd"),
        ("/v1/operations/x?wait=61", "wait"),
        ("/v1/operations/x?wait=nan", "wait"),
        ("/v1/events?since=-1", "since"),
        ("/v1/host/doctor?fresh=x", "fresh"),
    ],
)
async def test_a_bad_query_parameter_is_named(http: httpx.AsyncClient, url: str, name: str) -> None:
    said = problem(await http.get(url), 400, "invalid")
    assert name in said["detail"]


async def test_each_request_leaves_one_line(http: httpx.AsyncClient, lines: LogCapture) -> None:
    reply = await http.post("/v1/vms", json={"name": "web"})
    await http.get("/v1/vms/nobody")
    await http.get("/nowhere")
    first, second, third = lines.entries
    assert first.pop("ms") >= 0
    assert first == {
        "event": "request",
        "log_level": "info",
        "method": "POST",
        "route": "/v1/vms",
        "path": None,
        "status": 202,
        "actor": "unix:uid=0",
        "request_id": reply.headers["x-request-id"],
    }
    assert (second["route"], second["status"], second["code"]) == ("/v1/vms/{vm}", 404, "not-found")
    assert (third["route"], third["path"], third["status"]) == (None, "/nowhere", 404)
