"""The serial console: its history, its watchers, what is typed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from mica.client import Client
from mica.client.console import Console
from mica.client.handle import VmHandle
from mica.qemu.logs import KEEP
from tests.integration.conftest import create
from tests.integration.shell import shell
from tests.integration.world import World

pytestmark = pytest.mark.guest


async def read_until(console: Console, mark: str, timeout_s: float = 60.0) -> str:
    text = ""
    async with asyncio.timeout(timeout_s):
        async for data in console:
            text += data.decode(errors="replace")
            if mark in text:
                return text
    raise AssertionError(f"the console ended before {mark!r}: {text!r}")


async def test_history_survives_the_end_of_the_vm(booted: VmHandle) -> None:
    async with shell(booted) as guest:
        await guest.run("echo said in the first life")
    await booted.stop(force=True)
    assert b"said in the first life" in await booted.log()
    async with booted.console() as console:  # history only, and then it ends
        text = b"".join([data async for data in console])
    assert b"said in the first life" in text
    await booted.start()
    await booted.wait_agent(timeout_s=90)
    async with shell(booted) as guest:
        await guest.run("echo said in the second life")
    history = await booted.log()
    assert history.index(b"said in the first life") < history.index(b"said in the second life")
    # From an offset on, exactly what comes after it.
    async with booted.console(offset=len(history) - 10) as console:
        assert await anext(console) == history[-10:]


async def test_several_watch_and_type(booted: VmHandle) -> None:
    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(shell(booted))
        consoles = [await stack.enter_async_context(booted.console()) for _ in range(3)]
        await consoles[0].write(b"echo typed-by-$((1+0))\n")
        await consoles[1].write(b"echo typed-by-$((1+1))\n")
        for console in consoles:
            await read_until(console, "typed-by-2")
        await consoles[2].__aexit__(None, None, None)  # one leaves, the others see on
        assert await guest.run("echo still here") == "still here"
        seen = [await read_until(console, "still here") for console in consoles[:2]]
        assert seen[0] == seen[1]


async def test_what_is_typed_just_before_leaving_arrives(booted: VmHandle) -> None:
    async with shell(booted) as guest:
        await guest.run("rm -f /tmp/typed")
    text = b"echo " + b"x" * 900 + b" > /tmp/typed\n"
    async with booted.console() as console:
        await console.write(text)
    async with shell(booted) as guest:
        await guest.run("until [ -s /tmp/typed ]; do usleep 50000; done", timeout_s=20)
        assert await guest.run("wc -c < /tmp/typed") == "901"


async def test_a_flood_is_bounded_and_the_end_is_kept(shared_world: World, booted: VmHandle) -> None:
    """Faster than anybody reads, for longer than is kept: the daemon stays quick, the log short, nobody is stuck."""
    log = shared_world.home / "logs" / booted.id / "console.log"
    async with booted.console() as slow:  # a watcher that does not read
        async with shell(booted) as guest:
            await guest.run(f"head -c {KEEP * 9 // 4} /dev/zero | tr '\\0' x", timeout_s=200)
            await guest.run("echo the end")
        async with asyncio.timeout(30):
            while log.stat().st_blocks * 512 > 2 * KEEP:  # the keeper's next round
                await asyncio.sleep(0.1)
        size = log.stat().st_size
        assert size > 2 * KEEP
        assert booted.view.process is not None
        limits = Path(f"/proc/{booted.view.process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max file size")]
        assert 48 * KEEP + size < int(line.split()[3]) <= 1030 * KEEP
        history = await booted.log(tail=16 * KEEP)
        assert KEEP <= len(history) <= 2 * KEEP
        assert b"\0" not in history
        assert b"the end" in history[-200:]
        text = await read_until(slow, "the end")
        assert len(text) + slow.missed >= 2 * KEEP
        assert "\0" not in text


async def test_a_console_of_a_vm_that_never_ran_is_empty(vm: VmHandle) -> None:
    assert await vm.log() == b""
    async with vm.console() as console:
        assert [data async for data in console] == []


async def test_input_of_a_stopped_vm_is_refused(shared_client: Client, shared_world: World) -> None:
    vm = await create(shared_client, "mute")
    try:
        done = await asyncio.to_thread(shared_world.cli, "vm", "log", "mute")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    finally:
        await vm.remove()
