"""The agent's channel and commands, against an agent that is honest, slow, absent, or lying."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mica.guest.agent import AgentRefusedError, GuestAgent, Request
from mica.guest.guests import AgentGuests
from mica.guest.replies import FileRead
from mica.model.errors import Code, MicaError
from mica.model.vm import ProcessRef, VmRuntime, VmSpec
from mica.testing.agent_server import FakeAgent, Misbehaviour


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    async with FakeAgent(tmp_path / "qga.sock") as server:
        yield server


@pytest.fixture
async def agent(server: FakeAgent) -> AsyncIterator[GuestAgent]:
    agent = GuestAgent(server.path, guest="vm 'a'", timeout_s=2.0)
    yield agent
    await agent.close()


async def test_every_plain_command_answers_with_its_type(server: FakeAgent, agent: GuestAgent) -> None:
    await agent.ping()
    info = await agent.info()
    assert "guest-exec" in info.enabled
    assert not info.disabled
    assert (await agent.osinfo()).pretty_name == "Fake 1"
    assert await agent.hostname() == "fake"
    (interface,) = await agent.network_interfaces()
    assert interface.ip_addresses[0].ip_address == "127.0.0.1"
    assert (await agent.users())[0].user == "root"
    assert (await agent.filesystems())[0].total_bytes is None
    assert abs(await agent.time() - time.time()) < 5
    await agent.set_time(1_700_000_000.5)
    await agent.set_time(None)
    assert await agent.fsfreeze() == 1
    assert await agent.fsfreeze_status() == "frozen"
    assert await agent.fsthaw() == 1
    assert server.calls[0] == "guest-sync-delimited"
    assert server.calls.count("guest-sync-delimited") == 1


async def test_files_and_processes(agent: GuestAgent, tmp_path: Path) -> None:
    handle = await agent.file_open(str(tmp_path / "f"), "w+")
    await agent.file_write(handle, b"\x00\xff" * 5000)
    await agent.file_flush(handle)
    assert await agent.file_seek(handle, 9998) == 9998
    read = await agent.file_read(handle, 100)
    assert (read.buf_b64, read.eof) == (b"\x00\xff", True)
    await agent.file_close(handle)
    pid = await agent.exec_raw("/bin/sh", ["-c", "echo out; echo err >&2; exit 7"], env=["A=1"])
    status = await agent.exec_wait(pid, timeout_s=5)
    assert (status.exitcode, status.out_data, status.err_data) == (7, b"out\n", b"err\n")
    with pytest.raises(AgentRefusedError, match="does not exist"):
        await agent.exec_status(pid)


async def test_requests_of_many_tasks_are_answered_each_with_its_own(agent: GuestAgent, tmp_path: Path) -> None:
    async def one(number: int) -> None:
        path = tmp_path / str(number)
        path.write_bytes(str(number).encode())
        handle = await agent.file_open(str(path))
        assert (await agent.file_read(handle, 10)).buf_b64 == str(number).encode()
        await agent.file_close(handle)

    await asyncio.gather(*(one(n) for n in range(50)))


async def test_a_batch_keeps_its_order_and_its_refusals(agent: GuestAgent) -> None:
    first, second, third = await agent.batch(
        [agent.open_request("/absent/file"), Request("guest-get-time", int), Request("guest-nonsense", dict)]
    )
    assert isinstance(first, AgentRefusedError)
    assert first.absent_file
    assert second > 0
    assert isinstance(third, AgentRefusedError)
    assert third.unknown


async def test_a_forbidden_command_is_named(tmp_path: Path) -> None:
    async with FakeAgent(tmp_path / "s", policy=frozenset({"guest-exec"})) as server:
        agent = GuestAgent(server.path, guest="vm 'a'")
        with pytest.raises(MicaError, match="the policy of vm 'a' forbids guest-exec") as caught:
            await agent.exec_raw("/bin/true")
        assert caught.value.code is Code.AGENT_FAILED
        assert "allow-rpcs" in caught.value.hint
        assert "guest-exec" in (await agent.info()).disabled
        await agent.close()


async def test_a_frozen_guest_says_that_it_is_frozen(server: FakeAgent, agent: GuestAgent) -> None:
    server.frozen = True
    with pytest.raises(MicaError, match="frozen: its agent refuses guest-exec until they thaw") as caught:
        await agent.exec_raw("/bin/true")
    assert caught.value.retryable


async def test_an_old_agent_is_told_apart_from_a_strict_one(agent: GuestAgent) -> None:
    with pytest.raises(MicaError, match="too old for guest-fstrim"):
        await agent.fstrim()


async def test_shutdown_takes_silence_for_success(server: FakeAgent, agent: GuestAgent) -> None:
    started = time.monotonic()
    task = asyncio.create_task(agent.shutdown())
    while server.shut_down is None:
        await asyncio.sleep(0.01)
    agent.port_closed()  # as the guest goes down
    await task
    assert server.shut_down == "powerdown"
    assert time.monotonic() - started < 2


async def test_shutdown_reports_a_refusal(tmp_path: Path) -> None:
    async with FakeAgent(tmp_path / "s", policy=frozenset({"guest-shutdown"})) as server:
        agent = GuestAgent(server.path)
        with pytest.raises(MicaError, match="forbids guest-shutdown"):
            await agent.shutdown()
        await agent.close()


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (Misbehaviour.HANG, Code.TIMEOUT),
        (Misbehaviour.NOT_JSON, Code.AGENT_FAILED),
        (Misbehaviour.WRONG_TYPE, Code.AGENT_FAILED),
        (Misbehaviour.EMPTY_OBJECT, Code.AGENT_FAILED),
        (Misbehaviour.NEVER_ENDING_LINE, Code.AGENT_FAILED),
        (Misbehaviour.HUGE, Code.AGENT_FAILED),
        (Misbehaviour.FLOOD, Code.AGENT_FAILED),
        (Misbehaviour.DEEP, Code.AGENT_FAILED),
        (Misbehaviour.HANG_UP, Code.AGENT_UNAVAILABLE),
    ],
)
async def test_a_lying_agent_ends_in_an_error_and_the_next_command_works(
    server: FakeAgent, agent: GuestAgent, how: Misbehaviour, code: Code
) -> None:
    server.misbehave("guest-get-host-name", how)
    with pytest.raises(MicaError) as caught:
        await agent._simple("guest-get-host-name", FileRead, 0.5)
    assert caught.value.code is code, caught.value
    if how is Misbehaviour.FLOOD:
        server.drop_connections()
    server.misbehave("guest-get-host-name", None)
    assert await agent.hostname() == "fake"


async def test_an_answer_nobody_asked_for_never_answers_the_next_question(server: FakeAgent, agent: GuestAgent) -> None:
    server.misbehave("guest-get-host-name", Misbehaviour.UNASKED)
    for _ in range(20):
        assert await agent.hostname() == "fake"
        assert (await agent.osinfo()).id == "fake"


async def test_a_read_that_says_more_than_it_has_is_refused(agent: GuestAgent) -> None:
    for lie in (FileRead(5, False, b"abc"), FileRead(3, False, b"abc")):
        with pytest.raises(MicaError, match="said it read") as caught:
            agent.check_read(lie, 2)
        assert caught.value.code is Code.AGENT_FAILED


async def test_a_late_answer_after_a_timeout_is_not_taken_for_the_next(server: FakeAgent, agent: GuestAgent) -> None:
    await agent.ping()
    server.delay_s = 0.3
    with pytest.raises(MicaError) as caught:
        await agent.ping(timeout_s=0.1)
    assert caught.value.code is Code.TIMEOUT
    server.delay_s = 0.0
    assert await agent.hostname() == "fake"
    assert server.calls.count("guest-sync-delimited") >= 2


async def test_a_cancelled_command_leaves_the_channel_usable(server: FakeAgent, agent: GuestAgent) -> None:
    await agent.ping()
    server.delay_s = 0.2
    task = asyncio.create_task(agent.hostname())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.delay_s = 0.0
    assert (await agent.osinfo()).id == "fake"


async def test_waiting_ends_as_soon_as_the_port_opens(server: FakeAgent, agent: GuestAgent) -> None:
    server.close_port()
    agent.port_closed()
    with pytest.raises(MicaError, match="no agent is running") as caught:
        await agent.ping()
    assert caught.value.code is Code.AGENT_UNAVAILABLE
    task = asyncio.create_task(agent.wait_ready(10))
    await asyncio.sleep(0.3)
    server.open_port()
    opened = time.monotonic()
    agent.port_opened()
    await task
    assert time.monotonic() - opened < 0.1
    assert agent.ready


async def test_waiting_without_events_retries_what_was_dropped(server: FakeAgent, agent: GuestAgent) -> None:
    server.close_port()
    task = asyncio.create_task(agent.wait_ready(10))
    await asyncio.sleep(0.5)
    assert not task.done()
    server.open_port()
    await asyncio.wait_for(task, 3)
    await agent.ping()


async def test_waiting_ends_with_the_time_and_says_so(server: FakeAgent, agent: GuestAgent) -> None:
    server.close_port()
    started = time.monotonic()
    with pytest.raises(MicaError, match=r"vm 'a' did not answer within 0\.4s") as caught:
        await agent.wait_ready(0.4)
    assert caught.value.code is Code.AGENT_UNAVAILABLE
    assert time.monotonic() - started < 2


async def test_a_closing_port_fails_the_command_under_way(server: FakeAgent, agent: GuestAgent) -> None:
    await agent.ping()
    server.misbehave("guest-ping", Misbehaviour.HANG)
    task = asyncio.create_task(agent.ping(timeout_s=30))
    await asyncio.sleep(0.05)
    agent.port_closed()
    with pytest.raises(MicaError) as caught:
        await asyncio.wait_for(task, 1)
    assert caught.value.code is Code.AGENT_UNAVAILABLE


async def test_an_ending_connection_fails_the_waiter_and_is_opened_again(server: FakeAgent, agent: GuestAgent) -> None:
    server.misbehave("guest-ping", Misbehaviour.HANG)
    task = asyncio.create_task(agent.ping(timeout_s=30))
    while "guest-ping" not in server.calls:
        await asyncio.sleep(0.01)
    server.drop_connections()
    with pytest.raises(MicaError) as caught:
        await asyncio.wait_for(task, 1)
    assert caught.value.code is Code.AGENT_UNAVAILABLE
    assert await agent.hostname() == "fake"


async def test_no_socket_means_unavailable(tmp_path: Path) -> None:
    agent = GuestAgent(tmp_path / "absent", guest="vm 'b'")
    with pytest.raises(MicaError, match="no agent port of vm 'b'") as caught:
        await agent.ping()
    assert caught.value.code is Code.AGENT_UNAVAILABLE


async def test_a_hung_agent_lets_only_so_many_wait(server: FakeAgent, agent: GuestAgent) -> None:
    server.misbehave("guest-ping", Misbehaviour.HANG)
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(_code(agent)) for _ in range(300)]
    codes = [task.result() for task in waiting]
    assert codes.count(Code.BUSY) == 300 - 256
    assert codes.count(Code.TIMEOUT) >= 1


async def _code(agent: GuestAgent) -> Code:
    with pytest.raises(MicaError) as caught:
        await agent.ping(timeout_s=0.3)
    return caught.value.code


async def test_a_ready_connection_adds_little(server: FakeAgent, agent: GuestAgent) -> None:
    """Against the same exchange done with a bare socket, so that the machine's speed cancels out."""
    await agent.ping()
    reader, writer = await asyncio.open_unix_connection(server.path)

    async def bare() -> None:
        writer.write(b'{"execute":"guest-ping"}\n')
        await reader.readline()

    ours, theirs = [], []
    for _ in range(200):
        started = time.perf_counter()
        await agent.ping()
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        await bare()
        theirs.append(time.perf_counter() - started)
    writer.close()
    print(f"ours {statistics.median(ours) * 1e6:.0f} us, bare {statistics.median(theirs) * 1e6:.0f} us")
    assert statistics.median(ours) < 5 * statistics.median(theirs)


async def test_guests_freeze_anew_and_thaw_as_often_as_asked(tmp_path: Path) -> None:
    guests = AgentGuests()
    runtime = VmRuntime(
        process=ProcessRef(1, 1, ""), spec=VmSpec(), run_dir=str(tmp_path), accelerator="", started_at=0.0
    )
    async with FakeAgent(tmp_path / "agent") as server:
        try:
            await guests.freeze("a", runtime)
            assert server.frozen
            await guests.freeze("a", runtime)
            assert server.calls[-3:] == ["guest-fsfreeze-status", "guest-fsfreeze-thaw", "guest-fsfreeze-freeze"]
            for _ in range(2):
                await guests.thaw("a", runtime)
                assert not server.frozen
        finally:
            await guests.close()
