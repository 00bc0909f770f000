"""What a guest reaches, and who reaches a guest."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.model.errors import Code, MicaError
from mica.model.vm import NetworkKind, NicSpec, Publish, VmState
from mica.network import proof
from tests.integration.conftest import create
from tests.integration.network import fetch, greeter, online, serve
from tests.integration.shell import Shell, shell
from tests.integration.world import World

pytestmark = pytest.mark.guest

GREETING = "hello from the host"


async def hears(guest: Shell, *servers: tuple[str, int]) -> list[bool]:
    """Whether the guest hears the greeting of each server, all asked at once."""
    asking = [
        f"timeout 5 nc -w 4 {host} {port} < /dev/null > /tmp/heard-{n} 2>&1 &" for n, (host, port) in enumerate(servers)
    ]
    await guest.run(" ".join([*asking, "wait"]))
    return [GREETING in await guest.run(f"cat /tmp/heard-{n}") for n in range(len(servers))]


async def test_published_outbound_and_nothing_else(shared_vm: VmHandle) -> None:
    nic = shared_vm.view.nics[0]
    published = nic.publish[0]
    assert published.host_port > 0
    async with shell(shared_vm) as guest:
        await serve(guest, 8080, "from the guest")
        assert await fetch(published.host_port) == "from the guest"
        assert nic.address in await guest.run("ip -4 addr show dev eth0")
        own = proof._own_address()
        gateway = (await guest.run("ip route | grep default")).split()[2]
        async with greeter("127.0.0.1") as loopback, greeter("0.0.0.0") as everywhere:
            # By no name of the host's does its loopback answer; what listens on its own address does.
            names = [gateway, "10.0.2.2", "127.0.0.1", "169.254.1.1", *([str(own)] if own else [])]
            heard = await hears(guest, *((name, loopback) for name in names), (gateway, everywhere))
            assert heard == [False] * len(heard), list(zip(names, heard, strict=False))
            if own is not None:
                assert await hears(guest, (str(own), everywhere)) == [True]
    if own is not None:  # published on the loopback only
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(str(own), published.host_port)


async def test_a_server_that_speaks_first_is_heard(shared_vm: VmHandle) -> None:
    """As mail servers and databases do: the client waits for the first word."""
    port = shared_vm.view.nics[0].publish[1].host_port
    async with shell(shared_vm) as guest:
        await online(guest)
        await guest.run("echo welcome > /tmp/welcome")
        await guest.run("nc -ll -p 2525 -e cat /tmp/welcome > /dev/null 2>&1 < /dev/null & true")
        await guest.run("until netstat -tln | grep -q :2525; do usleep 50000; done")
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(15):
                assert await reader.readline() == b"welcome\n"
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def test_addresses_differ_and_guests_are_apart(shared_vm: VmHandle, booted: VmHandle) -> None:
    there, here = shared_vm.view.nics[0].address, booted.view.nics[0].address
    assert there != here
    macs = {vm.view.spec.nics[0].mac for vm in (shared_vm, booted)}
    assert len(macs) == 2
    async with shell(shared_vm) as other:
        await serve(other, 8081, "the other guest")
    async with shell(booted) as guest:
        await online(guest)
        assert here in await guest.run("ip -4 addr show dev eth0")
        assert "the other guest" not in await guest.run(f"wget -T 3 -q -O - http://{there}:8081/ 2>&1")


async def test_a_port_that_is_taken_refuses_the_start(shared_world: World, shared_client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        vm = await create(shared_client, "publisher", publish=[f"{port}:80"])
        try:
            with pytest.raises(MicaError) as caught:
                await vm.start()
            assert caught.value.code is Code.IN_USE
            assert str(port) in caught.value.message
            assert caught.value.hint
            view = await vm.refresh()
            assert view.observed.state is VmState.STOPPED
            assert view.observed.problem is not None
            assert not [pid for pid, words in shared_world.processes().items() if vm.id in words]
        finally:
            await vm.remove()


async def test_two_vms_cannot_publish_one_port(shared_client: Client, shared_vm: VmHandle) -> None:
    port = shared_vm.view.nics[0].publish[0].host_port
    vm = await create(shared_client, "second", publish=[f"{port}:80"])
    try:
        with pytest.raises(MicaError) as caught:
            await vm.start()
        assert caught.value.code is Code.IN_USE
        await vm.set(nics=(NicSpec(publish=(Publish(80),)),))
        await vm.start()
        assert vm.view.nics[0].publish[0].host_port not in (0, port)
    finally:
        await vm.remove()


async def test_nics_without_network_and_with_long_names(shared_client: Client) -> None:
    nics = (
        NicSpec(name="n" * 63),
        NicSpec(name="unplugged", network=NetworkKind.NONE),
        NicSpec(name="unplugged-too", network=NetworkKind.NONE),
    )
    vm = await create(shared_client, "three-nics", nics=nics)
    try:
        await vm.start()
        await vm.wait_agent(timeout_s=90)
        async with shell(vm) as guest:
            await online(guest)
            # In the order of the spec.
            macs = (await guest.run("cat /sys/class/net/eth0/address /sys/class/net/eth[12]/address")).split()
            assert macs == [nic.mac for nic in vm.view.spec.nics]
            assert (
                await guest.run("ip link set eth1 up; ip link set eth2 up; cat /sys/class/net/eth*/carrier")
                == "1\n0\n0"
            )
    finally:
        await vm.remove()


async def test_a_vm_without_nics_runs(shared_client: Client) -> None:
    vm = await create(shared_client, "no-nics", nics=())
    try:
        await vm.start()
        assert vm.view.nics == ()
        async with shell(vm) as guest:
            assert await guest.run("ls /sys/class/net") == "lo"
    finally:
        await vm.remove()
