"""A VM gets what it was given, and no more; a start that does not fit is refused before anything is touched."""

from __future__ import annotations

import asyncio
import time

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.client.vms import make_create, vm_id
from mica.model.errors import Code, MicaError
from mica.model.image import Firmware
from mica.model.units import MIB, Bytes
from mica.model.vm import DiskSpec, IoLimits, VmState
from mica.qemu.command_line import Sockets
from mica.qemu.qmp import Monitor
from tests.integration.conftest import create
from tests.integration.shell import shell
from tests.integration.world import World, new_world

pytestmark = pytest.mark.guest


async def used_cpus(world: World, vm: VmHandle, seconds: float) -> float:
    """Host processors that a VM uses over some seconds, by its control group."""
    began, first = time.monotonic(), world.cpu_seconds(vm.id)
    await asyncio.sleep(seconds)
    return (world.cpu_seconds(vm.id) - first) / (time.monotonic() - began)


async def test_the_cpu_limit_holds_and_changes_at_once(shared_world: World, booted: VmHandle) -> None:
    if not shared_world.cpu_limits():
        pytest.skip("no control groups on this host")
    async with shell(booted) as guest:
        await guest.run("while :; do :; done > /dev/null 2>&1 & true")
        await booted.set(cpu_limit=0.2)
        assert booted.view.pending == ()
        assert shared_world.cpu_limits()[booted.id] == 0.2
        assert await used_cpus(shared_world, booted, 2.5) < 0.26
        await booted.set(cpu_limit=0.6)
        assert 0.26 < await used_cpus(shared_world, booted, 2.5) < 0.7
        usage = (await booted.refresh()).usage
        assert usage.cpu_s is not None
        assert usage.cpu_s <= shared_world.cpu_seconds(booted.id)
        await booted.set(cpu_limit=None)
        assert shared_world.cpu_limits()[booted.id] == 1.5


async def inserted(world: World, vm: VmHandle, disk: str) -> dict[str, int]:
    """What QEMU itself says of a disk, asked over the rescue monitor as the daemon holds the other."""
    monitor = await Monitor.connect("rescue", Sockets(world.runtime / "vm" / vm.id / "0" / "run").rescue)
    try:
        blocks = await monitor.run("query-block")
    finally:
        await monitor.close()
    found: dict[str, int] = next(b["inserted"] for b in blocks if f"/dev-{disk}/" in b.get("qdev", ""))
    return found


async def test_io_limits_reach_qemu_and_the_disk(shared_world: World, shared_client: Client) -> None:
    limits = IoLimits(iops=0, bytes_per_s=Bytes(MIB))
    vm = await create(shared_client, "throttled", disks=(DiskSpec(name="slow", size=Bytes(64 * MIB), limits=limits),))
    try:
        await vm.start()
        assert (await inserted(shared_world, vm, "slow"))["bps"] == MIB
        async with shell(vm) as guest:
            await guest.run("until [ -b /dev/vda ]; do usleep 100000; done")
            began = time.monotonic()
            await guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=5 oflag=direct 2>/dev/null")
            assert time.monotonic() - began > 2.5  # a second's worth may go at once
            disk = vm.view.spec.disks[0]
            await vm.set(disks=(DiskSpec(name="slow", size=disk.size, limits=IoLimits(iops=77)),))
            assert vm.view.pending == ()
            seen = await inserted(shared_world, vm, "slow")
            assert (seen["iops"], seen["bps"]) == (77, 0)
    finally:
        await vm.remove()


async def test_a_start_that_does_not_fit_says_what_would(shared_client: Client, shared_vm: VmHandle) -> None:
    host = await shared_client.host()
    vm = await create(shared_client, "huge", memory=int(host.memory) // MIB * MIB)
    async with asyncio.timeout(30):  # it may have started just now, and is looked at every few seconds
        while (await shared_vm.refresh()).usage.cpu_s is None:
            await asyncio.sleep(0.1)
    try:
        before = (await shared_client.host()).committed
        with pytest.raises(MicaError) as caught:
            await vm.start()
        error = caught.value
        assert error.code is Code.INSUFFICIENT_MEMORY
        for word in ("huge needs", "for QEMU", "is free for VMs", "is kept for the host"):
            assert word in error.message
        assert "it would start with" in error.hint
        assert "mica vm set huge --memory" in error.hint
        assert shared_vm.name in {c["name"] for c in error.details["candidates"]}
        assert error.details["need"] > host.memory
        assert (await vm.refresh()).observed.state is VmState.STOPPED
        assert (await shared_client.host()).committed == before
        # What it says is true.
        fits = error.hint.partition("--memory ")[2].partition("M")[0]
        await vm.set(memory=f"{int(fits) - 1024}M")  # what is free changes by the moment
        await vm.start(paused=True)
        assert vm.state is VmState.PAUSED
    finally:
        await vm.remove()


async def test_more_vcpus_than_the_host_has_are_insisted_on(shared_client: Client) -> None:
    host = await shared_client.host()
    vm = await create(shared_client, "wide", cpus=host.cpus + 1)
    try:
        with pytest.raises(MicaError) as caught:
            await vm.start()
        assert caught.value.code is Code.INSUFFICIENT_CPU
        assert str(host.cpus) in caught.value.message
        await vm.start(overcommit=True)
        assert vm.state is VmState.RUNNING
    finally:
        await vm.remove()


def test_a_reserve_is_kept() -> None:
    """Starts at the same time cannot both take the last of the memory."""
    with new_world() as world:

        async def fill() -> None:
            async with world.client() as client:
                host = await client.host()
                left = 800 * MIB
                reserve = host.available - left
                world.kill()
                world.configure(reserve=str(int(reserve)))
                world.start()
            async with world.client() as client:
                vms = [await create(client, f"v{n}", memory="96M") for n in range(6)]
                done = await asyncio.gather(*(vm.start(paused=True) for vm in vms), return_exceptions=True)
                refused = [e for e in done if isinstance(e, MicaError)]
                assert {e.code for e in refused} == {Code.INSUFFICIENT_MEMORY}
                assert 1 <= len(refused) < 6
                host = await client.host()
                assert host.reserve == int(reserve)
                assert "stopping" in refused[0].hint

        asyncio.run(fill())


async def test_a_uefi_machine_without_a_system_reaches_its_firmware(shared_world: World, shared_client: Client) -> None:
    operation = await shared_client.vms.create(
        make_create("", name="bare", memory="256M", disk="64M", firmware=Firmware.UEFI)
    )
    vm = await shared_client.vms.get(vm_id(operation))
    try:
        await vm.start()
        nvram = list((shared_world.home / "volumes" / vm.id).glob("nvram*"))
        assert len(nvram) == 1
        # OVMF says on the serial port what it tries to boot from; without a system it ends in its shell or its menu.
        async with vm.console() as console:
            text = ""
            async with asyncio.timeout(90):
                while "BdsDxe" not in text and "UEFI" not in text:
                    text += (await anext(console)).decode(errors="replace")
        view = await vm.refresh()
        assert view.observed.state is VmState.RUNNING
    finally:
        await vm.remove()
