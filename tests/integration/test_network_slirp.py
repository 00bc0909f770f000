"""A VM on QEMU's own user mode, on a host without passt: what it has, and what of the loopback it reaches."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.model.doctor import Status
from mica.model.errors import Code, MicaError
from mica.model.vm import AgentState, VmState
from mica.network import addresses
from tests.integration.conftest import MEMORY, create
from tests.integration.network import fetch, greeter, online, serve
from tests.integration.shell import shell
from tests.integration.test_network import hears
from tests.integration.world import World, new_world

pytestmark = pytest.mark.guest

NO_PASST = "/nonexistent/passt"


@pytest.fixture
def without_passt() -> Iterator[World]:
    """Root insists; an ordinary user need not."""
    with new_world(passt=NO_PASST, slirp="allow" if os.geteuid() == 0 else "") as made:
        yield made


async def test_a_guest_without_passt(without_passt: World) -> None:
    async with without_passt.client() as client:
        vm = await client.run("micro", name="reduced", memory=MEMORY, publish=["0:8080"], agent_timeout_s=90)
        nic = vm.view.nics[0]
        assert any("QEMU's own user mode" in text and "loopback" in text for text in vm.view.reduced)
        assert "QEMU's own user mode" in without_passt.cli("vm", "show", "reduced").stdout
        async with shell(vm) as guest:
            await serve(guest, 8080, "from the guest")
            assert nic.address in await guest.run("ip -4 addr show dev eth0")
            gateway = (await guest.run("ip route | grep default")).split()[2]
            told = re.findall(r"nameserver (\S+)", await guest.run("cat /etc/resolv.conf"))
            pool = addresses.choose_pool([network for _, network in addresses.read_routes()])
            assert told[0] in (str(host) for host in pool)
            # What makes it a reduced mode, and why it says so.
            async with greeter("127.0.0.1") as loopback:
                assert await hears(guest, (gateway, loopback)) == [True]
        assert await fetch(nic.publish[0].host_port) == "from the guest"
        await _in_the_jail_but_for_the_network(vm)
        await _the_port_is_not_given_twice(client, nic.publish[0].host_port)
        found = next(f for f in (await client.doctor()).findings if f.id == "network")
        assert found.status is Status.DEGRADED
        assert NO_PASST in found.proof
        assert "loopback" in found.costs
    await asyncio.to_thread(without_passt.restart)
    await _goes_on(without_passt, vm)
    assert without_passt.leftovers() == []


async def _in_the_jail_but_for_the_network(vm: VmHandle) -> None:
    assert vm.view.process is not None
    there, here = Path(f"/proc/{vm.view.process.pid}"), Path("/proc/self")
    status = dict(line.split(":\t", 1) for line in (there / "status").read_text().splitlines() if ":\t" in line)
    assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
    if os.geteuid() == 0:  # others may not look at namespaces of what they have jailed
        same = {
            name for name in ("mnt", "pid", "net", "ipc", "uts") if _namespace(there, name) == _namespace(here, name)
        }
        assert same == {"net"}
        assert (there / "root/etc/resolv.conf").read_bytes() == Path("/etc/resolv.conf").read_bytes()


def _namespace(process: Path, name: str) -> str:
    return os.readlink(process / "ns" / name)


async def _the_port_is_not_given_twice(client: Client, port: int) -> None:
    second = await create(client, "second", publish=[f"{port}:80"])
    with pytest.raises(MicaError) as caught:
        await second.start()
    assert caught.value.code is Code.IN_USE
    assert str(port) in caught.value.message
    await second.remove()


async def _goes_on(world: World, before: VmHandle) -> None:
    async with world.client() as client:
        view = await client.vms.wait_until(
            "reduced", lambda v: v.observed.agent is AgentState.READY, timeout_s=30, what="the adoption"
        )
        assert (view.process, view.nics, view.reduced) == (before.view.process, before.view.nics, before.view.reduced)
        assert await fetch(view.nics[0].publish[0].host_port) == "from the guest"
        vm = await client.vms.get("reduced")
        taken = await vm.snapshot("moment")
        assert taken.snapshot.lost == ("the connections of net0, whose network is a part of QEMU",)
        assert await fetch(view.nics[0].publish[0].host_port) == "from the guest"
        assert (await vm.snapshot("later")).snapshot.lost == ()  # it stays in its QEMU from now on
        (copy,) = await vm.fork()
        assert str(await copy.exec("echo", "here")) == "here"
        await copy.remove()
        await vm.restore_snapshot("later", keep=False)
        assert await fetch((await vm.refresh()).nics[0].publish[0].host_port) == "from the guest"
        await vm.restart()  # takes the same port again
        await vm.wait_agent(timeout_s=90)
        async with shell(vm) as guest:
            await online(guest)
        await vm.stop(timeout_s=60)
        assert vm.view.observed.state is VmState.STOPPED
        await vm.remove()


@pytest.fixture
def refusing() -> Iterator[World]:
    with new_world(passt=NO_PASST, slirp="refuse") as made:
        yield made


async def test_it_is_refused_by_a_setting(refusing: World) -> None:
    async with refusing.client() as client:
        vm, bare = await create(client, "refused"), await create(client, "bare", nics=())
        with pytest.raises(MicaError) as caught:
            await vm.start()
        assert caught.value.code is Code.HOST_LACKS
        assert NO_PASST in caught.value.message
        assert "slirp = allow" in caught.value.hint
        assert (await vm.refresh()).observed.state is VmState.STOPPED
        await bare.start()
        await asyncio.gather(vm.remove(), bare.remove())
    assert refusing.leftovers() == []
