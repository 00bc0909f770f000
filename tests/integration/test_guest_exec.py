"""Commands in a real guest, through a real agent: every byte, every end, whoever dies in between."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path

import pytest

from mica.client.handle import VmHandle
from mica.model.errors import Code, MicaError
from mica.model.exec import ExecState
from tests.integration.world import World

pytestmark = pytest.mark.guest


async def test_status_output_and_every_byte(shared_vm: VmHandle) -> None:
    assert str(await shared_vm.exec("uname", "-s")) == "Linux"
    result = await shared_vm.exec("sh", "-c", r"printf '\000\377\n\001'; echo error >&2; exit 7", check=False)
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"\x00\xff\n\x01", b"error\n")
    words = ["", "a b", "'", '"', "$HOME", "a\nb", "*", "\\", "é"]
    result = await shared_vm.exec("printf", r"%s\0", *words)
    assert result.stdout.split(b"\0")[:-1] == [word.encode() for word in words]


async def test_quick_commands_one_after_the_other_and_side_by_side(shared_vm: VmHandle) -> None:
    for number in range(8):
        assert str(await shared_vm.exec("echo", str(number))) == str(number)
    results = await asyncio.gather(*(shared_vm.exec("sh", "-c", f"sleep 0.{n}; echo {n}") for n in range(6)))
    assert [str(result) for result in results] == [str(n) for n in range(6)]


async def test_environment_directory_and_user(shared_vm: VmHandle) -> None:
    result = await shared_vm.exec("sh", "-c", 'echo "$A $PWD $USER"', env={"A": "it's", "B.C": "x"}, cwd="/etc")
    assert str(result) == "it's /etc root"
    await shared_vm.exec(
        "sh", "-c", "grep -q ^tester: /etc/passwd || echo tester:x:4321:4321::/tmp:/bin/sh >>/etc/passwd"
    )
    await shared_vm.exec("sh", "-c", "grep -q ^tester: /etc/group || echo tester:x:4321: >>/etc/group")
    result = await shared_vm.exec("sh", "-c", 'id -u; id -g; echo "$USER $HOME"; echo "$@"', "x", "a  b", user="tester")
    assert str(result) == "4321\n4321\ntester /tmp\na  b"
    for fields, message in (
        ({"user": "nobody-such"}, "there is no user 'nobody-such'"),
        ({"cwd": "/no/such"}, "there is no directory '/no/such'"),
    ):
        with pytest.raises(MicaError, match=message) as caught:
            await shared_vm.exec("true", **fields)  # type: ignore[arg-type]
        assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(MicaError, match="there is no program 'no-such-program'"):
        await shared_vm.exec("no-such-program")


async def test_input_goes_in_whole(shared_vm: VmHandle) -> None:
    data = os.urandom(3 * 1024**2)
    result = await shared_vm.exec("sha256sum", stdin=data)
    assert str(result).split()[0] == hashlib.sha256(data).hexdigest()


async def test_input_and_output_are_live(shared_vm: VmHandle) -> None:
    async with shared_vm.exec_stream("cat", stdin=True) as command:
        for text in (b"one\n", b"\x00two"):
            await command.write(text)
            async with asyncio.timeout(20):
                assert await anext(command) == ("stdout", text)
        await command.close_stdin()
        assert [piece async for piece in command] == []
    assert command.record.exit_code == 0


async def test_time_out_ends_the_command_and_its_children(shared_vm: VmHandle) -> None:
    with pytest.raises(MicaError, match="did not end within") as caught:
        await shared_vm.exec("sh", "-c", "trap '' TERM; sleep 7777 & sleep 7777", timeout_s=1)
    assert caught.value.code is Code.TIMEOUT
    result = await shared_vm.exec("sh", "-c", "ps | grep -c '[7]777'", check=False)
    assert str(result) == "0"


async def test_a_signal_arrives(shared_vm: VmHandle) -> None:
    async with shared_vm.exec_stream(
        "sh", "-c", "trap 'echo got; exit 3' HUP; echo ready; while :; do sleep 1; done"
    ) as c:
        assert await anext(c) == ("stdout", b"ready\n")
        await c.kill(signal.SIGHUP)
        assert b"".join([data async for channel, data in c if channel == "stdout"]) == b"got\n"
    assert c.record.exit_code == 3


async def test_an_agent_that_is_restarted_loses_no_command(booted: VmHandle) -> None:
    result = await booted.exec("sh", "-c", "echo before; killall qemu-ga; sleep 3; echo after")
    assert str(result) == "before\nafter"
    assert str(await booted.exec("echo", "again")) == "again"


async def test_a_restart_of_the_guest_is_told(booted: VmHandle) -> None:
    async with booted.exec_stream("sh", "-c", "echo kept; sleep 1; reboot -f") as command:
        pieces = [data async for _, data in command]
    assert b"".join(pieces) == b"kept\n"
    assert command.record.state is ExecState.LOST


async def test_output_is_whole_though_daemons_are_killed(world: World) -> None:
    """Random bytes, then silence, then the same bytes: exactly once each, across three daemons."""
    size = 2 * 1024**2
    text = (
        f"dd if=/dev/urandom of=/tmp/r bs=65536 count={size // 65536} 2>/dev/null; cat /tmp/r; "
        "sha256sum /tmp/r >&2; sleep 4; cat /tmp/r; exit 5"
    )
    async with world.client() as client:
        vm = await client.run("micro", name="whole", memory="128M", agent_timeout_s=90)
        out, err = b"", b""
        async with vm.exec_stream("sh", "-c", text) as command:
            killed = 0
            async for channel, data in command:
                if channel == "stdout":
                    out += data
                else:
                    err += data
                if killed < 2 and len(out) > (100_000, 1_200_000)[killed]:
                    killed += 1
                    await asyncio.to_thread(world.restart)
        assert killed == 2
        assert command.record.exit_code == 5
        assert len(out) == 2 * size
        assert out[:size] == out[size:]
        assert hashlib.sha256(out[:size]).hexdigest() == err.split()[0].decode()
        # Each daemon had a shell wait there for commands: those of the dead ones were ended, the command's own was not.
        async with asyncio.timeout(60):
            while len(str(await vm.exec("sh", "-c", "ls -d /run/mica-*")).split()) > 2:
                await asyncio.sleep(0.2)
        await vm.remove()


async def test_files_go_in_and_come_out_as_they_were(shared_vm: VmHandle, tmp_path: Path) -> None:
    """Compressible and not, through the programs that a real guest has, and not at all where there is no space."""
    source = tmp_path / "copied"
    source.mkdir()
    (source / "text").write_bytes(b"much the same " * 100_000)
    (source / "noise").write_bytes(os.urandom(700_001))
    try:
        report = await shared_vm.copy_in(source, "/tmp")
        assert (report.files, report.verified) == (2, True)
        await shared_vm.copy_out("/tmp/copied", tmp_path / "back")
        for file in ("text", "noise"):
            assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
        with (tmp_path / "huge").open("wb") as huge:
            huge.truncate(1024**4)
        with pytest.raises(MicaError, match="the copy needs 1 TiB in /tmp of shared") as caught:
            await shared_vm.copy_in(tmp_path / "huge", "/tmp")
        assert caught.value.code is Code.INSUFFICIENT_DISK
        assert str(await shared_vm.exec("sh", "-c", "ls -A /tmp | grep -c mica-cp", check=False)) == "0"
    finally:
        await shared_vm.exec("rm", "-rf", "/tmp/copied")
