"""The client against a daemon's API over a UNIX socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from mica import Client, MicaError
from mica.client.transport import parse_url, problem_error
from mica.client.vms import make_create, parse_publish, vm_id
from mica.model.errors import Code
from mica.model.operation import Operation, OperationState
from mica.model.units import MIB
from mica.model.views import VmCreate, VmSet
from mica.model.vm import AgentState, Publish, VmState
from tests.unit.client_fixtures import TOKEN, Served, served

replace = msgspec.structs.replace


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
async def client(api: Served) -> AsyncIterator[Client]:
    async with Client(api.url) as c:
        yield c


async def test_a_vm_through_its_life(client: Client) -> None:
    made = await client.vms.create(make_create("", name="web", memory="512M", labels={"tier": "web"}))
    vm = await client.vms.get("web")
    assert vm_id(made) == vm.id
    assert vm.view.spec.memory == 512 * MIB
    assert (await vm.start()).state is VmState.RUNNING
    assert (await vm.suspend()).state is VmState.SUSPENDED
    assert (await (await vm.discard()).start()).state is VmState.RUNNING
    assert (await vm.pause()).state is VmState.PAUSED
    assert (await vm.resume()).state is VmState.RUNNING
    assert (await vm.set(cpus=2, labels={"tier": None})).view.spec.cpus == 2
    assert vm.view.labels == {}
    assert (await vm.stop()).state is VmState.STOPPED
    await vm.delete()
    assert await client.vms.list() == []
    assert [item.name for item in await client.vms.list(trashed=True)] == ["web"]
    assert (await vm.restore(name="web2")).name == "web2"
    await vm.remove()
    await vm.remove()  # gone already is no error
    with pytest.raises(MicaError, match="web2"):
        await client.vms.get("web2")


async def test_lists_come_whole_whatever_their_length(api: Served, client: Client) -> None:
    async def many() -> None:
        for number in range(1203):
            await api.engine._vm_create("", VmCreate(name=f"vm-{number}", labels={"odd": str(number % 2)}), None)

    api.call(many())
    assert len(await client.vms.list()) == 1203
    assert len(await client.vms.list(labels={"odd": "1"})) == 601


async def test_a_problem_arrives_with_everything(client: Client) -> None:
    with pytest.raises(MicaError) as caught:
        await client.vms.get("nobody")
    assert caught.value.code is Code.NOT_FOUND
    assert "nobody" in caught.value.message
    assert "mica vm list" in caught.value.hint
    assert caught.value.details["key"] == "nobody"


async def test_a_generation_that_has_passed_is_refused(client: Client) -> None:
    await client.vms.create(make_create("", name="web"))
    with pytest.raises(MicaError) as caught:
        await client.vms.set("web", VmSet(cpus=2), if_match=1)
    assert caught.value.code is Code.GENERATION_CONFLICT


async def test_waiting_ends_when_the_operation_does(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="slow"), wait=False)
    operation = await client.vms.start("slow", wait=False)
    seen: list[Operation] = []
    waiting = asyncio.ensure_future(client.operations.wait(operation.id, seen.append))
    while not seen:
        await asyncio.sleep(0.01)
    assert not waiting.done()
    await asyncio.to_thread(api.call, api.engine.finish(operation.id))
    began = time.monotonic()
    assert (await waiting).state is OperationState.SUCCEEDED
    assert time.monotonic() - began < 5
    assert seen[0].state is OperationState.RUNNING


@pytest.mark.parametrize(
    ("state", "code"), [(OperationState.CANCELLED, Code.CANCELLED), (OperationState.STUCK, Code.STUCK)]
)
async def test_an_operation_that_did_not_succeed_is_an_error(
    api: Served, client: Client, state: OperationState, code: Code
) -> None:
    await client.vms.create(make_create("", name="slow"), wait=False)
    operation = await client.vms.start("slow", wait=False)
    await asyncio.to_thread(api.call, api.engine.finish(operation.id, state))
    with pytest.raises(MicaError) as caught:
        await client.operations.wait(operation.id)
    assert caught.value.code is code
    assert caught.value.details["operation"] == operation.id


async def test_waiting_has_an_end(client: Client) -> None:
    await client.vms.create(make_create("", name="slow"), wait=False)
    operation = await client.vms.start("slow", wait=False)
    with pytest.raises(MicaError) as caught:
        await client.operations.wait(operation.id, timeout_s=0.05)
    assert caught.value.code is Code.TIMEOUT
    assert operation.id in caught.value.hint


async def test_waiting_outlives_a_restart_of_the_daemon(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="slow"), wait=False)
    operation = await client.vms.start("slow", wait=False)
    waiting = asyncio.ensure_future(client.operations.wait(operation.id))
    await asyncio.to_thread(api.stop)
    await asyncio.to_thread(api.start)
    await asyncio.to_thread(api.call, api.engine.finish(operation.id))
    assert (await waiting).state is OperationState.SUCCEEDED


async def test_events_go_on_after_a_restart_of_the_daemon(api: Served, client: Client) -> None:
    events = client.events(0)
    await client.vms.create(make_create("", name="one"))
    first = await anext(events)
    assert (first.kind, first.object["name"]) == ("vm", "one")
    assert (await anext(events)).kind == "operation"
    await asyncio.to_thread(api.stop)
    await asyncio.to_thread(api.start)
    await client.vms.create(make_create("", name="two"))
    second = await anext(events)
    assert (second.kind, second.object["name"]) == ("vm", "two")
    await events.aclose()


async def test_events_that_are_no_longer_kept_are_said_to_be_gone(api: Served, client: Client) -> None:
    api.engine.now, api.engine.oldest = 200, 100
    with pytest.raises(MicaError) as caught:
        await anext(client.events(1))
    assert caught.value.code is Code.GONE


async def test_waiting_for_the_agent_goes_by_events(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    vm = await client.vms.get("web")
    waiting = asyncio.ensure_future(vm.wait_agent(timeout_s=20))

    async def answer() -> None:
        while not api.engine.listeners:
            await asyncio.sleep(0.01)
        view = api.engine.machines[vm.id]
        await api.engine._put(replace(view, observed=replace(view.observed, agent=AgentState.READY)))

    await asyncio.to_thread(api.call, answer())
    await waiting
    assert vm.view.observed.agent is AgentState.READY


async def test_a_guest_that_ends_ends_the_wait(client: Client) -> None:
    await client.vms.create(make_create("", name="web"))
    vm = await client.vms.get("web")
    with pytest.raises(MicaError, match="web is stopped"):
        await vm.wait_agent(timeout_s=20)


async def test_an_agent_that_never_answers(client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    with pytest.raises(MicaError) as caught:
        await client.vms.wait_agent("web", timeout_s=0.2)
    assert caught.value.code is Code.AGENT_UNAVAILABLE
    assert "mica vm console web" in caught.value.hint


async def test_run_builds_a_known_image_and_names_the_others(client: Client) -> None:
    vm = await client.run("micro", name="one", wait_agent=False)
    assert (vm.state, vm.view.image_name) == (VmState.RUNNING, "micro")
    assert [view.image.name for view in await client.images.list()] == ["micro"]
    with pytest.raises(MicaError) as caught:
        await client.run("windows")
    assert caught.value.code is Code.NOT_FOUND
    assert "there are: micro" in caught.value.hint
    assert "debian" in caught.value.hint


async def test_rm_deletes_at_the_end_of_the_block(client: Client) -> None:
    async with await client.run("micro", name="one", rm=True) as vm:
        assert [item.id for item in await client.vms.list()] == [vm.id]
    assert await client.vms.list() == []


async def test_the_console_shows_history_and_types(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    vm = await client.vms.get("web")
    await asyncio.to_thread(api.call, api.engine.print(vm.id, b"login: "))
    async with vm.console() as mine, vm.console(offset=3) as other:
        assert await anext(mine) == b"login: "
        assert await anext(other) == b"in: "
        await mine.write(b"root")
        assert await anext(mine) == b"ROOT"
        assert await anext(other) == b"ROOT"
        assert mine.offset == other.offset == 11


async def test_the_console_goes_on_without_a_gap(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    vm = await client.vms.get("web")
    await asyncio.to_thread(api.call, api.engine.print(vm.id, b"one "))
    async with vm.console() as console:
        assert await anext(console) == b"one "
        await asyncio.to_thread(api.stop)
        await asyncio.to_thread(api.call, api.engine.print(vm.id, b"two "))
        await asyncio.to_thread(api.start)
        assert await anext(console) == b"two "
        await console.write(b"x")
        assert await anext(console) == b"X"
        assert console.missed == 0


async def test_console_history_that_is_gone_is_counted(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    vm = await client.vms.get("web")
    await asyncio.to_thread(api.call, api.engine.print(vm.id, b"0123456789"))
    api.engine.kept_from = 4
    async with vm.console(offset=1) as console:
        assert await anext(console) == b"456789"
        assert console.missed == 3


async def test_a_console_that_refuses_says_why(client: Client) -> None:
    await client.vms.create(make_create("", name="web"))
    vm = await client.vms.get("web")
    async with vm.console() as console:
        await console.write(b"x")
        with pytest.raises(MicaError) as caught:
            await anext(console)
    assert caught.value.code is Code.STATE_CONFLICT
    await client.vms.delete("web", purge=True)
    with pytest.raises(MicaError) as caught:
        async with vm.console():
            raise AssertionError
    assert caught.value.code is Code.NOT_FOUND


async def test_logs(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    vm = await client.vms.get("web")
    await asyncio.to_thread(api.call, api.engine.print(vm.id, b"0123456789"))
    assert await vm.log(tail=3) == b"789"
    assert await vm.log("qemu") == b"qemu says nothing\n"


async def test_no_daemon(tmp_path: Path) -> None:
    async with Client(f"unix://{tmp_path}/none.sock") as client:
        with pytest.raises(MicaError) as caught:
            await client.host()
    assert caught.value.code is Code.DAEMON_UNREACHABLE
    async with Client(home=tmp_path / "home", autostart=False, environ={}) as client:
        with pytest.raises(MicaError) as caught:
            await client.vms.list()
    assert caught.value.code is Code.DAEMON_UNREACHABLE
    assert "mica up" in caught.value.hint


async def test_every_request_has_a_deadline(tmp_path: Path) -> None:
    """A daemon that takes connections and says nothing."""
    path = f"/tmp/mica-silent-{id(tmp_path):x}.sock"
    held: list[asyncio.StreamWriter] = []

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_unix_server(hold, path)
    try:
        async with Client(f"unix://{path}", timeout_s=0.2) as client:
            with pytest.raises(MicaError) as caught:
                await client.host()
            assert caught.value.code is Code.TIMEOUT
            assert "0.2 s" in caught.value.message
    finally:
        for writer in held:
            writer.close()
        server.close()
        await server.wait_closed()
        Path(path).unlink(missing_ok=True)


async def test_a_mutation_is_sent_again_after_a_lost_connection_and_happens_once(api: Served) -> None:
    """A proxy cuts the first answer off: the daemon has done it, the client does not know."""
    path = api.socket.with_name("proxy.sock")
    requests: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(h.split(b":")[1]) for h in request.lower().split(b"\r\n") if h.startswith(b"content-length")), 0
        )
        request += await reader.readexactly(length)
        requests.append(request)
        upstream, out = await asyncio.open_unix_connection(str(api.socket))
        out.write(request)
        answer = await upstream.readuntil(b"\r\n\r\n")
        if len(requests) > 1:
            size = next(int(h.split(b":")[1]) for h in answer.lower().split(b"\r\n") if h.startswith(b"content-length"))
            writer.write(answer + await upstream.readexactly(size))
        out.close()
        writer.close()

    server = await asyncio.start_unix_server(proxy, str(path))
    try:
        async with Client(f"unix://{path}") as client:
            operation = await client.vms.create(make_create("", name="web"), wait=False)
    finally:
        server.close()
        await server.wait_closed()
    assert operation.state is OperationState.SUCCEEDED
    assert len(requests) == 2
    assert [view.name for view in api.engine.machines.values()] == ["web"]


async def test_over_tcp_with_a_token(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="web", start=True))
    async with Client(api.tcp_url, TOKEN, environ={}) as remote:
        vm = await remote.vms.get("web")
        async with vm.console() as console:
            await console.write(b"x")
            assert await anext(console) == b"X"
        assert (await vm.exec("both", check=False)).exit_code == 3
    async with Client(api.tcp_url, "wrong", environ={}) as stranger:
        with pytest.raises(MicaError) as caught:
            await stranger.vms.list()
        assert caught.value.code is Code.UNAUTHENTICATED
        with pytest.raises(MicaError) as caught:
            await stranger.transport.websocket("/v1/vms/web/console")
        assert caught.value.code is Code.UNAUTHENTICATED
    async with Client(environ={"MICA_URL": api.tcp_url, "MICA_TOKEN": TOKEN}) as remote:
        assert (await remote.host()).hostname == "test"


def test_urls() -> None:
    assert parse_url("unix:///run/mica/api.sock", "").socket == "/run/mica/api.sock"
    assert parse_url("http://127.0.0.1:8006/", "t").url == "http://127.0.0.1:8006"
    for bad in ("ftp://host", "host:80", "unix://relative", ""):
        with pytest.raises(MicaError, match="is not the URL"):
            parse_url(bad, "")
    with pytest.raises(MicaError, match="unencrypted") as caught:
        parse_url("http://example.org:8006", "t")
    assert "ssh -L" in caught.value.hint


def test_answers_that_are_no_problem() -> None:
    assert problem_error(b"<html>bad gateway", 502, "GET /v1/vms").code is Code.INTERNAL
    newer = problem_error(b'{"code":"brand-new","detail":"told you","hint":"update"}', 418, "GET /v1/vms")
    assert (newer.code, newer.hint, newer.details["code"]) == (Code.INTERNAL, "update", "brand-new")


@pytest.mark.parametrize(
    ("text", "publish"),
    [
        ("80", Publish(80)),
        ("8080:80", Publish(80, 8080)),
        ("0.0.0.0:53:5353/udp", Publish(5353, 53, "0.0.0.0", "udp")),
        ("[::1]:8080:80", Publish(80, 8080, "::1")),
    ],
)
def test_published_ports(text: str, publish: Publish) -> None:
    assert parse_publish(text) == publish


@pytest.mark.parametrize("text", ["", "a:b", "1:2:3:4", "80/"[:2] + ":x"])
def test_published_ports_that_make_no_sense(text: str) -> None:
    with pytest.raises(MicaError, match="does not say what to publish"):
        parse_publish(text)


async def test_a_daemon_that_dies_takes_every_idle_connection_along(api: Served) -> None:
    """Each of them fails only when the next request is already on its way."""
    path = api.socket.with_name("proxy.sock")
    alive = True
    cut = 0

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal cut
        mortal = alive
        upstream, out = await asyncio.open_unix_connection(str(api.socket))
        while (request := await reader.read(65536)) and (alive or not mortal):
            out.write(request)
            head = await upstream.readuntil(b"\r\n\r\n")
            size = next(int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length"))
            writer.write(head + await upstream.readexactly(size))
        cut += bool(request)
        out.close()
        writer.close()

    async with await asyncio.start_unix_server(proxy, str(path)), Client(f"unix://{path}") as client:
        await asyncio.gather(*(client.events.revision() for _ in range(4)))
        alive = False
        assert await client.events.revision() > 0
    assert cut == 4
