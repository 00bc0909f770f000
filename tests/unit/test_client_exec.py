"""Commands in guests through the client. The guest's programs are those of the engine in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from mica import Client, MicaError
from mica.client.execs import exit_code
from mica.client.handle import VmHandle
from mica.client.together import alongside
from mica.client.vms import make_create
from mica.model.errors import Code, Problem
from mica.model.exec import ExecSpec, ExecState, ExecView
from tests.unit.client_fixtures import Served, served


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
async def vm(api: Served) -> AsyncIterator[VmHandle]:
    async with Client(api.url) as client:
        await client.vms.create(make_create("", name="web", start=True))
        yield await client.vms.get("web")


async def test_output_and_status(vm: VmHandle) -> None:
    result = await vm.exec("both", check=False)
    assert (result.exit_code, result.stdout, result.stderr, str(result)) == (3, b"out", b"err", "out")
    with pytest.raises(MicaError) as caught:
        await vm.exec("both")
    assert caught.value.code is Code.COMMAND_FAILED
    assert "status 3: err" in caught.value.message


@pytest.mark.parametrize("stdin", ["text", b"bytes \xff\x00", b"x" * 300_000])
async def test_input(vm: VmHandle, stdin: str | bytes) -> None:
    expected = stdin.encode() if isinstance(stdin, str) else stdin
    assert (await vm.exec("cat", stdin=stdin)).stdout == expected


async def test_input_that_comes_bit_by_bit(vm: VmHandle) -> None:
    async def bits() -> AsyncIterator[bytes]:
        for number in range(5):
            yield str(number).encode()

    assert str(await vm.exec("cat", stdin=bits())) == "01234"


async def test_input_that_is_not_taken_is_no_error_of_ours(vm: VmHandle, api: Served) -> None:
    running = asyncio.ensure_future(vm.exec("deaf", stdin=b"x" * 100_000))
    while "exec-1" not in api.engine.commands:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(api.call, api.engine.end("exec-1", 0))
    assert (await running).exit_code == 0


async def test_input_that_breaks_off_ends_the_call(vm: VmHandle) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"1"
        raise OSError("the tape is torn")

    with pytest.raises(OSError, match="torn"):
        await vm.exec("cat", stdin=broken())


async def test_a_program_that_is_not_there(vm: VmHandle) -> None:
    with pytest.raises(MicaError) as caught:
        await vm.exec("nonesuch")
    assert caught.value.code is Code.AGENT_FAILED


async def test_live_and_killed(vm: VmHandle) -> None:
    async with vm.exec_stream("cat", stdin=True) as command:
        await command.write(b"hello")
        assert await anext(command) == ("stdout", b"hello")
        await command.kill(2)
        record = await command.wait()
        assert (record.state, command.result().exit_code) == (ExecState.KILLED, 130)


async def test_output_is_whole_after_a_restart_of_the_daemon(vm: VmHandle, api: Served) -> None:
    async with vm.exec_stream("sleep", "9") as command:
        engine, id_ = api.engine, command.id
        await asyncio.to_thread(api.call, engine.say(id_, "stdout", b"one "))
        assert await anext(command) == ("stdout", b"one ")
        await asyncio.to_thread(api.stop)
        await asyncio.to_thread(api.call, engine.say(id_, "stdout", b"two "))
        await asyncio.to_thread(api.call, engine.say(id_, "stderr", b"oops"))
        await asyncio.to_thread(api.call, engine.end(id_, 0))
        await asyncio.to_thread(api.start)
        rest = sorted([item async for item in command])
        assert rest == [("stderr", b"oops"), ("stdout", b"two ")]
        assert command.result().exit_code == 0


async def test_input_is_not_repeated_after_a_lost_connection(vm: VmHandle, api: Served) -> None:
    """Nobody knows whether what was on its way arrived, so nothing is sent twice."""
    async with vm.exec_stream("cat", stdin=True) as command:
        await command.write(b"once")
        assert await anext(command) == ("stdout", b"once")
        await asyncio.to_thread(api.stop)
        await asyncio.to_thread(api.start)

        await asyncio.to_thread(api.call, api.engine.say(command.id, "stdout", b"more"))
        assert await anext(command) == ("stdout", b"more")  # output goes on
        for late in (command.write(b"twice"), command.close_stdin()):
            with pytest.raises(MicaError) as caught:
                await late
            assert caught.value.code is Code.DAEMON_UNREACHABLE
        assert not api.engine.commands[command.id].state.final


async def test_a_connection_that_carried_no_input_may_be_lost(vm: VmHandle, api: Served) -> None:
    async with vm.exec_stream("cat", stdin=True) as command:
        await asyncio.to_thread(api.stop)
        await asyncio.to_thread(api.start)
        await asyncio.to_thread(api.call, api.engine.say(command.id, "stdout", b"ready"))
        assert await anext(command) == ("stdout", b"ready")
        await command.write(b"go")
        assert await anext(command) == ("stdout", b"go")
        await command.close_stdin()
        await command.wait()
        assert command.result().exit_code == 0


async def test_too_much_output_is_refused_to_be_kept(vm: VmHandle) -> None:
    from mica.client import execs

    with pytest.raises(MicaError) as caught:
        await execs.run(vm.exec_stream("yes", "200000"), None, max_output=100_000)
    assert caught.value.code is Code.TOO_LARGE
    assert len((await vm.exec("yes", "200000")).stdout) == 200_000


async def test_no_command(vm: VmHandle) -> None:
    with pytest.raises(MicaError, match="no command"):
        await vm.exec()


def test_how_a_command_ended() -> None:
    spec = ExecSpec(argv=("x",))
    record = ExecView(id="1", vm_id="2", spec=spec)
    replace = msgspec.structs.replace
    assert exit_code(replace(record, state=ExecState.EXITED, exit_code=7)) == 7
    assert exit_code(replace(record, state=ExecState.KILLED, signal=15)) == 143
    with pytest.raises(MicaError, match="has not ended"):
        exit_code(record)
    with pytest.raises(MicaError) as caught:
        exit_code(replace(record, state=ExecState.LOST))
    assert caught.value.code is Code.AGENT_UNAVAILABLE
    late = Problem(Code.TIMEOUT, "it took longer than 3 s")
    with pytest.raises(MicaError) as caught:
        exit_code(replace(record, state=ExecState.KILLED, exit_code=137, error=late))
    assert caught.value.code is Code.TIMEOUT


async def test_neither_direction_outlives_the_other() -> None:
    ended: list[str] = []

    async def forever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def value() -> int:
        await asyncio.sleep(0)
        return 7

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    assert await alongside(value(), forever("helper")) == 7
    with pytest.raises(ValueError, match="no"):
        await alongside(forever("main"), fails(), forever("other"))
    assert sorted(ended) == ["helper", "main", "other"]
