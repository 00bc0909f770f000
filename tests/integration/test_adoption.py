"""VMs outlive their daemon: the next one finds them again, and finds out what happened meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.host.processes import find
from mica.model.errors import Code
from mica.model.vm import AgentState, ProcessRef, VmState
from tests.integration.conftest import create
from tests.integration.network import fetch, serve
from tests.integration.shell import shell
from tests.integration.world import World, wait_for

pytestmark = pytest.mark.guest


async def boot(client: Client, name: str, **more: Any) -> VmHandle:
    return await client.run("micro", name=name, memory="128M", agent_timeout_s=90, **more)


async def started(client: Client, name: str) -> VmHandle:
    """Running, its guest just begun to boot."""
    return await (await create(client, name)).start()


def dead(process: ProcessRef | None) -> bool:
    assert process is not None
    found = find(process)
    if found is not None:
        found.close()
    return found is None


def keeper_of(vm: VmHandle) -> int:
    """bubblewrap, which stands outside and notes how QEMU ended."""
    assert vm.view.process is not None
    stat = Path(f"/proc/{vm.view.process.pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


async def test_a_new_daemon_goes_on_with_every_vm(world: World) -> None:
    async with world.client() as client:
        limited, held, idle = await asyncio.gather(
            boot(client, "limited", publish=["0:8080"], cpu_limit=0.5), boot(client, "held"), create(client, "idle")
        )
        await held.pause()
        port = limited.view.nics[0].publish[0].host_port
        async with shell(limited) as guest:
            await serve(guest, 8080, "still here")
            await guest.run("(sleep 2; echo said-while-alone > /dev/ttyS0) > /dev/null 2>&1 & true")
            await guest.run("echo said-before")
        assert await fetch(port) == "still here"
        committed = (await client.host()).committed
    before = {vm.name: vm.view for vm in (limited, held, idle)}
    limits = world.cpu_limits()
    assert not limits or limits[limited.id] == 0.5

    world.kill()
    assert sorted(world.qemus()) == sorted(v.process.pid for v in before.values() if v.process is not None)
    assert await fetch(port) == "still here"
    log = world.home / "logs" / limited.id / "console.log"
    wait_for("the guest's word", lambda: b"said-while-alone" in log.read_bytes())

    began = time.monotonic()
    world.start()
    async with world.client() as client:
        async with asyncio.timeout(20):
            while True:
                views = {vm.name: vm.view for vm in await client.vms.list()}
                if views["limited"].observed.agent is AgentState.READY and views["held"].observed.reason:
                    break
                await asyncio.sleep(0.02)
        print(f"adopted after {time.monotonic() - began:.2f} s")
        for name, view in views.items():
            old = before[name]
            assert (view.process, view.nics, view.spec) == (old.process, old.nics, old.spec)
            assert view.observed.state is old.observed.state
        assert (await client.host()).committed == committed
        assert world.cpu_limits() == limits
        limited, held = await client.vms.get("limited"), await client.vms.get("held")
        history = (await limited.log()).decode()
        assert history.index("said-before") < history.index("said-while-alone")
        assert await fetch(port) == "still here"
        # They obey the new daemon as they obeyed the old one.
        await held.resume()
        async with shell(limited) as guest:
            assert await guest.run("echo hears") == "hears"
        await asyncio.gather(limited.stop(timeout_s=60), held.stop(timeout_s=60))
        assert "the guest shut down" in limited.view.observed.reason
        assert "the guest shut down" in held.view.observed.reason
        await asyncio.gather(*(vm.delete(purge=True) for vm in await client.vms.list()))
    assert world.leftovers() == []


async def test_what_happened_while_nobody_watched(world: World) -> None:
    """One guest powers off, one QEMU is killed, one is killed together with who would note it, one just goes on."""
    async with world.client() as client:
        off, killed, lost, fine = await asyncio.gather(
            boot(client, "off"), *(started(client, name) for name in ("killed", "lost", "fine"))
        )
        async with shell(off) as guest:
            # Told and heard: the daemon that carries the words is about to die.
            await guest.run("{ (usleep 1500000; poweroff -f) >/dev/null 2>&1 & }")
        processes = {vm.name: vm.view.process for vm in (off, killed, lost, fine)}
    world.kill()
    for vm in (lost, killed):
        assert vm.view.process is not None
        if vm is lost:
            os.kill(keeper_of(vm), signal.SIGKILL)
        os.kill(vm.view.process.pid, signal.SIGKILL)
    for name in ("off", "killed", "lost"):
        wait_for(f"the end of {name}", lambda name=name: dead(processes[name]))  # type: ignore[misc]

    world.start()
    async with world.client() as client:
        async with asyncio.timeout(20):
            while True:
                views = {vm.name: vm.view for vm in await client.vms.list()}
                if [n for n, v in views.items() if v.observed.state is VmState.RUNNING] == ["fine"]:
                    break
                await asyncio.sleep(0.02)
        assert views["off"].observed.state is VmState.STOPPED
        assert views["off"].observed.reason == "the guest powered off while no daemon was watching"
        for name in ("killed", "lost"):
            seen = views[name].observed
            assert seen.state is VmState.CRASHED
            assert "ended unexpectedly while no daemon was watching" in seen.reason
            assert seen.problem is not None
            assert seen.problem.code is Code.QEMU_FAILED
            assert views[name].process is None
        host = await client.host()
        assert host.running == 1
        assert 128 * 2**20 < host.committed < 2 * 128 * 2**20 + 128 * 2**20
        assert world.qemus() == [views["fine"].process.pid if views["fine"].process else 0]
        # A crashed one starts again; a crashed and a stopped one are deleted like any other.
        again = await client.vms.get("killed")
        await again.start()
        assert again.view.observed.problem is None
        await asyncio.gather(*(vm.remove() for vm in await client.vms.list()))
    assert world.leftovers() == []


async def test_a_qemu_that_dies_is_told_at_once(running: VmHandle, shared_client: Client) -> None:
    assert running.view.process is not None
    os.kill(running.view.process.pid, signal.SIGKILL)
    view = await shared_client.vms.wait_until(
        running.id, lambda v: v.observed.state is not VmState.RUNNING, timeout_s=15, what="the crash"
    )
    assert view.observed.state is VmState.CRASHED
    assert view.observed.reason == "its QEMU process ended unexpectedly"
    assert view.observed.problem is not None
    assert "mica vm log" in view.observed.problem.hint


def edit_status(world: World, vm_id: str, change: Any) -> None:
    """Change a VM's stored status, as no daemon runs."""
    with contextlib.closing(sqlite3.connect(world.home / "state.db")) as database, database:
        (kind, value), *_ = database.execute(
            "SELECT kind, value FROM rows WHERE id = ? AND kind LIKE '%status%'", (vm_id,)
        )
        status = json.loads(value)
        change(status)
        data = json.dumps(status).encode()
        database.execute("UPDATE rows SET value = ? WHERE id = ? AND kind = ?", (data, vm_id, kind))


async def test_a_pid_that_belongs_to_another_process_now(world: World) -> None:
    """Neither adopted nor killed, by whatever record names it."""
    async with world.client() as client:
        vm = await started(client, "ghost")
    world.kill()
    old = vm.view.process
    assert old is not None
    keeper = keeper_of(vm)
    os.kill(keeper, signal.SIGKILL)
    os.kill(old.pid, signal.SIGKILL)
    wait_for("the end of QEMU", lambda: dead(old))
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:

            def rename(status: Any) -> None:
                status["runtime"]["process"]["pid"] = stranger.pid
                for key in ("process", "keeper"):
                    status["runtime"]["handle"]["jailed"][key]["pid"] = stranger.pid
                for nic in status["runtime"]["nics"]:
                    for ref in nic["handle"]["passt"]["processes"]:
                        ref["pid"] = stranger.pid

            edit_status(world, vm.id, rename)
            (world.runtime / "vm" / vm.id / "0" / "status.json").write_text(
                json.dumps({"child-pid": stranger.pid}) + "\n"
            )
            world.start()
            async with world.client() as client:
                view = await client.vms.wait_until(
                    "ghost", lambda v: v.observed.state is VmState.CRASHED, timeout_s=20, what="the crash"
                )
                assert view.process is None
                assert stranger.poll() is None
                await client.vms.start(vm.id)
                await client.vms.delete(vm.id, purge=True, force=True)
            assert stranger.poll() is None
            assert world.leftovers() == []
        finally:
            stranger.kill()


async def test_a_watcher_does_not_notice_the_new_daemon(world: World) -> None:
    """A console that is watched goes on, with nothing missing and nothing twice."""
    async with world.client() as client:
        vm = await boot(client, "talker")
        async with vm.console() as console:
            await console.write(b"i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line-$i.; usleep 100000; done\n")
            text = ""
            async with asyncio.timeout(90):
                while "line-10." not in text:
                    text += (await anext(console)).decode(errors="replace")
                await asyncio.to_thread(world.restart)
                while "line-60." not in text:
                    text += (await anext(console)).decode(errors="replace")
        found = [line.strip() for line in text.splitlines() if line.startswith("line-")]
        assert found == [f"line-{n}." for n in range(1, 61)]
        assert console.missed == 0


async def test_an_operation_that_was_under_way_ends(world: World) -> None:
    """A stop that waits for its guest when the daemon is killed is taken up by the next one."""
    async with world.client() as client:
        vm = await boot(client, "slow")
        async with shell(vm) as guest:
            await guest.run("kill -STOP $(pidof qemu-ga) $(pidof acpid); echo")
        operation = await client.vms.stop(vm.id, timeout_s=3, wait=False)
        async with asyncio.timeout(10):
            while not any(e.step == "halt" for e in (await client.operations.get(operation.id)).journal):
                await asyncio.sleep(0.01)
        assert (await vm.refresh()).observed.state is VmState.STOPPING
        await asyncio.to_thread(world.restart)
        ended = await client.operations.wait(operation.id, timeout_s=30)
        assert ended.result["how"] == "forced"
        assert (await vm.refresh()).observed.state is VmState.STOPPED
        starts = [e.event.value for e in ended.journal if e.step == "halt"]
        assert starts == ["started", "started", "succeeded"]


async def test_a_daemon_that_is_asked_to_end_leaves_the_vms_alone(world: World) -> None:
    async with world.client() as client:
        vm = await started(client, "alone")
        process = vm.view.process
    world.kill(signal.SIGTERM)
    assert world.qemus() == [process.pid if process else 0]
    world.start()
    async with world.client() as client:
        view = await client.vms.view("alone")
        assert msgspec.structs.asdict(view)["process"] == process
        assert view.observed.state is VmState.RUNNING


async def test_everything_of_a_vm_without_a_row_goes(world: World) -> None:
    """As after a database was put back from before the VM was made: QEMU, its network process, its control group."""
    async with world.client() as client:
        lost, kept = await started(client, "lost"), await started(client, "kept")
    world.kill()
    had = world.leftovers()
    assert any(lost.id in text and "passt" in text for text in had)
    with contextlib.closing(sqlite3.connect(world.home / "state.db")) as database, database:
        database.execute("DELETE FROM rows WHERE id = ?", (lost.id,))
    world.start()
    wait_for(
        "the end of what is left", lambda: not [text for text in world.leftovers() if lost.id in text], timeout_s=60
    )
    async with world.client() as client:
        view = await client.vms.view("kept")
        assert (view.observed.state, view.process, view.nics) == (VmState.RUNNING, kept.view.process, kept.view.nics)
    assert [text for text in had if kept.id in text] == [text for text in world.leftovers() if kept.id in text]
