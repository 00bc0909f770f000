"""The life of a VM on real guests, through the public client."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.model.errors import Code, MicaError
from mica.model.units import MIB, Bytes
from mica.model.vm import AgentState, DiskSpec, VmState
from tests.integration.conftest import create
from tests.integration.shell import shell
from tests.integration.world import World

pytestmark = pytest.mark.guest


async def test_a_whole_life(shared_world: World, shared_client: Client) -> None:
    vm = await create(shared_client, "whole", labels={"tier": "web"}, hostname="inside")
    assert (vm.state, vm.view.process) == (VmState.STOPPED, None)
    await vm.start()
    assert vm.state == VmState.RUNNING
    process = vm.view.process
    assert process is not None
    assert process.pid in shared_world.qemus()
    await vm.wait_agent(timeout_s=90)
    view = await shared_client.vms.wait_until(
        "whole", lambda v: bool(v.observed.addresses and v.observed.hostname), timeout_s=60, what="facts of the guest"
    )
    assert view.observed.hostname == "inside"
    assert "Mica micro" in view.observed.os
    assert view.nics[0].address in view.observed.addresses
    await vm.stop()
    assert vm.view.observed.state is VmState.STOPPED
    assert "the guest shut down" in vm.view.observed.reason
    assert (vm.view.observed.agent, vm.view.observed.addresses) == (AgentState.ABSENT, ())
    assert not Path(f"/proc/{process.pid}").exists()
    # Nothing is left of the run, and the next one works as the first.
    assert not [
        line for line in shared_world.leftovers() if vm.id in line and "/logs/" not in line and "/volumes/" not in line
    ]
    await vm.start()
    await vm.wait_agent(timeout_s=90)
    await vm.delete(purge=True, force=True)
    assert not [line for line in shared_world.leftovers() if vm.id in line]
    with pytest.raises(MicaError) as caught:
        await shared_client.vms.get("whole")
    assert caught.value.code is Code.NOT_FOUND
    verbs = [o.verb for o in await shared_client.operations.list(limit=50) if o.target == f"vm/{vm.id}"]
    assert verbs[::-1] == ["vm.create", "vm.start", "vm.stop", "vm.start", "vm.purge"]


async def test_pause_holds_the_guest_and_resume_lets_it_go(booted: VmHandle) -> None:
    async with shell(booted) as guest:
        assert await guest.run("echo awake") == "awake"
        await booted.pause()
        assert (booted.state, booted.view.observed.reason) == (VmState.PAUSED, "paused on request")
        await guest.console.write(b"echo $((6*7))-slept\n")
        with pytest.raises(TimeoutError):
            await guest.until("42-slept", timeout_s=1.5)
        await booted.pause()  # it is so already
        await booted.resume()
        assert booted.state is VmState.RUNNING
        assert "42-slept" in await guest.until("42-slept", timeout_s=30)
    await booted.resume()
    assert booted.state is VmState.RUNNING


async def test_a_suspended_guest_goes_on_where_it_was(shared_world: World, booted: VmHandle) -> None:
    await booted.exec("sh", "-c", "echo here > /tmp/word; (sleep 1000 & echo $! > /tmp/pid)")
    for _ in range(2):  # the second time it is a child of the memory that it went on from
        pid = str(await booted.exec("cat", "/tmp/pid"))
        process = booted.view.process
        assert process is not None
        await booted.suspend()
        assert (booted.state, booted.view.process) == (VmState.SUSPENDED, None)
        assert process.pid not in shared_world.qemus()
        await booted.resume()
        assert booted.state is VmState.RUNNING
        done = await booted.exec("sh", "-c", f"cat /tmp/word /proc/{pid}/comm")
        assert str(done).split() == ["here", "sleep"]
        host, guest = time.time(), float(str(await booted.exec("date", "+%s")))
        assert abs(host - guest) < 30, "its clock was set"
    await booted.exec("sh", "-c", "echo changed > /tmp/word")
    await booted.suspend()
    with pytest.raises(MicaError, match="suspended"):
        await booted.stop()
    await booted.discard()
    assert booted.state is VmState.STOPPED


async def test_a_paused_guest_is_let_go_to_shut_down(booted: VmHandle) -> None:
    await booted.pause()
    await booted.stop(timeout_s=60)
    assert "the guest shut down" in booted.view.observed.reason


async def test_a_guest_that_ignores_shutdown_is_forced(booted: VmHandle) -> None:
    async with shell(booted) as guest:
        # Neither the agent nor the power button is heard any more.
        await guest.run("kill -STOP $(pidof qemu-ga) $(pidof acpid); echo")
    began = time.monotonic()
    await booted.stop(timeout_s=2)
    assert 1.9 < time.monotonic() - began < 20
    assert booted.state is VmState.STOPPED
    assert "forced after 2" in booted.view.observed.reason
    operation = (await booted.operations(limit=1))[0]
    assert operation.result["how"] == "forced"


async def test_force_does_not_ask(running: VmHandle) -> None:
    began = time.monotonic()
    await running.stop(force=True)
    assert time.monotonic() - began < 5
    assert running.view.observed.reason == "forced"


async def test_the_power_button_is_pressed_when_there_is_no_agent(booted: VmHandle) -> None:
    async with shell(booted) as guest:
        # A press that comes before acpid listens is lost in this guest.
        await guest.run("until pidof acpid; do usleep 100000; done; usleep 500000")
        await guest.run("sed -i s/respawn:.sbin.agent/off:/ /etc/inittab; kill -HUP 1; kill -9 $(pidof qemu-ga); echo")
    await booted._vms.wait_until(
        booted.id, lambda v: v.observed.agent is AgentState.WAITING, timeout_s=30, what="a closed agent port"
    )
    operation = await booted._vms.stop(booted.id, timeout_s=60)
    assert operation.result["how"] == "guest"


async def test_a_guest_that_powers_off_is_seen(shared_client: Client, booted: VmHandle) -> None:
    async with shell(booted) as guest:
        await guest.console.write(b"poweroff -f\n")
        view = await shared_client.vms.wait_until(
            booted.id, lambda v: v.observed.state is VmState.STOPPED, timeout_s=30, what="the end of the guest"
        )
    assert view.observed.reason == "the guest powered off"
    assert view.observed.problem is None


async def test_a_guest_that_reboots_goes_on(booted: VmHandle) -> None:
    process = booted.view.process
    async with shell(booted) as guest:
        before = await guest.run("cat /proc/sys/kernel/random/boot_id")
        await guest.console.write(b"reboot -f\n")
        await guest.until("BusyBox")
    async with shell(booted) as guest:
        after = await guest.run("cat /proc/sys/kernel/random/boot_id")
    assert len(after) == len(before) == 36
    view = await booted.refresh()
    assert (view.observed.state, view.process) == (VmState.RUNNING, process)


async def test_restart_brings_what_was_pending(booted: VmHandle) -> None:
    first = booted.view.process
    await booted.set(memory="320M", cpus=2, labels={"a": "b"}, cpu_limit=0.9)
    assert set(booted.view.pending) == {"memory", "cpus"}
    assert booted.view.labels == {"a": "b"}
    await booted.restart(timeout_s=60)
    assert booted.view.pending == ()
    assert booted.view.process not in (None, first)
    await booted.wait_agent(timeout_s=90)
    async with shell(booted) as guest:
        assert await guest.run("grep -c ^processor /proc/cpuinfo") == "2"
        total = int((await guest.run("grep MemTotal /proc/meminfo")).split()[1]) * 1024
    assert 200 * MIB < total < 320 * MIB


async def test_rename_while_it_runs(shared_client: Client, running: VmHandle) -> None:
    old = running.name
    await running.set(name="renamed")
    assert (await shared_client.vms.get("renamed")).id == running.id
    with pytest.raises(MicaError):
        await shared_client.vms.get(old)
    again = await create(shared_client, old)  # the old name is free
    await again.remove()


async def test_start_paused_runs_nothing(vm: VmHandle) -> None:
    await vm.start(paused=True)
    assert vm.state is VmState.PAUSED
    with pytest.raises(MicaError) as caught:
        await vm.wait_agent(timeout_s=1.5)
    assert caught.value.code is Code.AGENT_UNAVAILABLE
    await vm.resume()
    await vm.wait_agent(timeout_s=90)


async def test_trash_and_back(shared_client: Client, vm: VmHandle) -> None:
    name = vm.name
    await vm.delete()
    assert [v.id for v in await shared_client.vms.list(trashed=True)].count(vm.id) == 1
    assert vm.id not in [v.id for v in await shared_client.vms.list()]
    other = await create(shared_client, name)  # its name is free meanwhile
    try:
        with pytest.raises(MicaError) as caught:
            await shared_client.vms.restore(vm.id)
        assert caught.value.code is Code.EXISTS
        await shared_client.vms.restore(vm.id, name="back")
    finally:
        await other.remove()
    view = await vm.refresh()
    assert (view.name, view.observed.state) == ("back", VmState.STOPPED)
    await vm.start()
    assert vm.state is VmState.RUNNING


async def test_a_protected_vm_is_not_deleted(vm: VmHandle) -> None:
    await vm.set(protected=True)
    for purge in (False, True):
        with pytest.raises(MicaError) as caught:
            await vm.delete(purge=purge, force=True)
        assert caught.value.code is Code.PROTECTED
    await vm.set(protected=False)


async def test_a_running_vm_is_not_deleted_without_force(running: VmHandle) -> None:
    with pytest.raises(MicaError) as caught:
        await running.delete()
    assert caught.value.code is Code.STATE_CONFLICT
    assert "--force" in caught.value.hint
    await running.delete(force=True)
    assert (await running.refresh()).observed.state is VmState.TRASHED


async def test_an_ephemeral_vm_is_gone_when_its_guest_is(shared_world: World, shared_client: Client) -> None:
    vm = await shared_client.run("micro", memory="128M", rm=True, agent_timeout_s=90)
    async with shell(vm) as guest:
        await guest.console.write(b"poweroff -f\n")
    async with asyncio.timeout(30):
        while True:
            try:
                await vm.refresh()
            except MicaError as error:
                code = error.code
                break
            await asyncio.sleep(0.05)
    assert code is Code.NOT_FOUND
    assert not [line for line in shared_world.leftovers() if vm.id in line]


async def test_a_disk_of_its_own_keeps_what_is_written(shared_client: Client) -> None:
    vm = await create(shared_client, "with-disk", disk="64M")
    try:
        await vm.start()
        async with shell(vm) as guest:
            await guest.run("until [ -b /dev/vda ]; do usleep 100000; done")
            assert await guest.run("cat /sys/block/vda/size /sys/block/vda/serial") == "131072\nroot"
            await guest.run("echo kept-on-disk | dd of=/dev/vda conv=fsync")
        await vm.stop(force=True)
        await vm.start()
        async with shell(vm) as guest:
            await guest.run("until [ -b /dev/vda ]; do usleep 100000; done")
            assert await guest.run("head -c 12 /dev/vda") == "kept-on-disk"
    finally:
        await vm.remove()


async def test_operations_on_one_vm_wait_for_each_other(vm: VmHandle, shared_client: Client) -> None:
    """Start and stop sent together: both are accepted, done in order, and the last word holds."""
    first = await shared_client.vms.start(vm.id, wait=False)
    second = await shared_client.vms.stop(vm.id, force=True, wait=False)
    third = await shared_client.vms.start(vm.id, wait=False)
    for operation in (first, second, third):
        await shared_client.operations.wait(operation.id)
    assert (await vm.refresh()).observed.state is VmState.RUNNING


async def test_many_starts_at_once(shared_client: Client) -> None:
    vms = await asyncio.gather(*(create(shared_client, f"many-{n}") for n in range(4)))
    try:
        await asyncio.gather(*(vm.start() for vm in vms))
        assert {vm.state for vm in vms} == {VmState.RUNNING}
        assert len({vm.view.nics[0].address for vm in vms}) == 4
    finally:
        await asyncio.gather(*(vm.remove() for vm in vms))


async def test_clones_have_the_disk_of_a_stopped_vm_and_become_themselves(shared_client: Client) -> None:
    vm = await create(shared_client, "original", disks=(DiskSpec(name="data", size=Bytes(64 * MIB)),))
    made = [vm]
    try:
        await (await vm.start()).wait_agent(timeout_s=90)
        await vm.exec("sh", "-c", "echo written > /dev/vda; sync")
        with pytest.raises(MicaError, match="runs"):
            await vm.clone()
        await vm.stop()
        made += [await vm.clone(name="linked"), await vm.clone(name="full", full=True)]
        for copy in made[1:]:
            assert (copy.state, copy.view.forked_from) == (VmState.STOPPED, "original")
        await vm.remove()
        for copy in made[1:]:
            await (await copy.start()).wait_agent(timeout_s=90)
            assert str(await copy.exec("head", "-n1", "/dev/vda")) == "written"
            await shared_client.vms.wait_until(
                copy.id, lambda v: bool(v.identity), timeout_s=60, what="an identity of its own"
            )
            assert str(await copy.exec("hostname")) == copy.name
            await copy.remove()
    finally:
        for one in made:
            await one.remove()
