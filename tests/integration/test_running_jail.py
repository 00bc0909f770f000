"""What somebody finds who has taken over the QEMU of a running VM: entered here, by its namespaces and its user id.

``test_isolation.py`` does the same to the adapters alone; this is the product, with everything that a daemon has.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mica.client import Client
from mica.client.handle import VmHandle
from mica.model.vm import VmState
from tests.integration.conftest import create
from tests.integration.world import World

pytestmark = [
    pytest.mark.guest,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="entering another user's namespaces needs root"),
]

CONNECT = (
    "perl -MSocket -e 'socket(S,{family},SOCK_STREAM,0) || die; print connect(S, {address}) ? q(reached) : qq(not: $!)'"
)


def connect_unix(path: Path) -> str:
    return CONNECT.format(family="PF_UNIX", address=f'sockaddr_un("{path}")')


def connect_tcp(port: int, host: str = "127.0.0.1") -> str:
    return CONNECT.format(family="PF_INET", address=f'sockaddr_in({port}, inet_aton("{host}"))')


class Intruder:
    """Runs commands with the rights of a VM's QEMU: inside its namespaces, or (worse) as its user outside of them."""

    def __init__(self, vm: VmHandle) -> None:
        assert vm.view.process is not None
        self.pid = vm.view.process.pid
        self.uid = Path(f"/proc/{self.pid}").stat().st_uid

    async def run(self, command: str, *, inside: bool = True) -> str:
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup"]
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--no-new-privs"]
        become += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        process = await asyncio.create_subprocess_exec(
            *(*(enter if inside else ()), *become, "env", "--chdir=/", "sh", "-c", command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": "/usr/bin:/usr/sbin", "LC_ALL": "C"},
            cwd="/",
        )
        async with asyncio.timeout(30):
            output, _ = await process.communicate()
        return output.decode(errors="replace").strip()


@pytest.fixture
async def pair(shared_client: Client) -> AsyncIterator[tuple[VmHandle, VmHandle]]:
    """Two running VMs with a disk each."""
    vms = [await create(shared_client, name, disk="8M") for name in ("inmate", "neighbour")]
    try:
        for vm in vms:
            await vm.start()
        yield vms[0], vms[1]
    finally:
        for vm in vms:
            await vm.remove()


def files_of(world: World, vm: VmHandle) -> dict[str, Path]:
    run = world.runtime / "vm" / vm.id / "0" / "run"
    return {
        "disk": world.home / "volumes" / vm.id / "root.qcow2",
        "console": world.home / "logs" / vm.id / "console.log",
        "messages": world.home / "logs" / vm.id / "qemu.log",
        "monitor": run / "qmp",
        "rescue": run / "rescue",
        "agent": run / "agent",
        "serial": run / "serial",
        "network": world.runtime / "net" / vm.id / "net0" / "link" / "socket",
    }


READ = "test -r {0} && head -c 1 {0} > /dev/null 2>&1 && echo readable; ( : >> {0} ) 2>/dev/null && echo writable"


async def test_another_vm_is_out_of_reach(shared_world: World, pair: tuple[VmHandle, VmHandle]) -> None:
    inmate, neighbour = pair
    intruder = Intruder(inmate)
    own, other = files_of(shared_world, inmate), files_of(shared_world, neighbour)
    assert all(path.exists() for path in [*own.values(), *other.values()])  # so that what is denied is there
    # The tools find what is theirs, so they would find what is not.
    assert await intruder.run(READ.format(own["disk"])) == "readable\nwritable"
    assert await intruder.run(connect_unix(own["serial"])) == "reached"
    for name, path in other.items():
        assert await intruder.run(f"ls {path}") == f"ls: cannot access '{path}': No such file or directory", name
        for inside in (True, False):
            assert await intruder.run(READ.format(path), inside=inside) == "", name
            if path.is_socket():
                assert (await intruder.run(connect_unix(path), inside=inside)).startswith("not: "), name
    assert neighbour.id not in await intruder.run("cat /proc/mounts")
    view = await neighbour.refresh()
    assert view.observed.state is VmState.RUNNING


async def test_the_daemon_is_out_of_reach(shared_world: World, pair: tuple[VmHandle, VmHandle]) -> None:
    intruder = Intruder(pair[0])
    assert shared_world.answers()
    for inside in (True, False):
        said = await intruder.run(connect_unix(shared_world.socket), inside=inside)
        assert said in ("not: No such file or directory", "not: Permission denied")
        for file in (shared_world.home / "state.db", shared_world.home / "daemon.lock", shared_world.log):
            assert file.exists()
            assert await intruder.run(READ.format(file), inside=inside) == ""
        assert (
            await intruder.run(f"touch {shared_world.home}/x {shared_world.runtime}/x 2>/dev/null", inside=inside) == ""
        )
        assert not (shared_world.home / "x").exists()
        assert not (shared_world.runtime / "x").exists()
    # Of the home only what leads to its own files.
    assert sorted((await intruder.run(f"ls {shared_world.home}")).split()) == ["images", "logs", "volumes"]
    assert (await intruder.run(f"ls {shared_world.home}/volumes")).split() == [pair[0].id]


async def test_the_image_can_be_read_and_not_changed(shared_world: World, pair: tuple[VmHandle, VmHandle]) -> None:
    (kernel,) = shared_world.home.glob("images/*/vmlinuz")
    intruder = Intruder(pair[0])
    assert await intruder.run(READ.format(kernel)) == "readable"
    assert await intruder.run(READ.format(kernel), inside=False) == "readable"


async def test_the_hosts_network_is_out_of_reach(pair: tuple[VmHandle, VmHandle]) -> None:
    intruder = Intruder(pair[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert await intruder.run(connect_tcp(port), inside=False) == "reached"  # it is the namespace that keeps it off
        assert (await intruder.run(connect_tcp(port))).startswith("not: ")
    assert (await intruder.run(connect_tcp(80, "192.0.2.1"))).startswith("not: ")
    assert (await intruder.run("tail -n +3 /proc/net/dev | cut -d: -f1")).split() == ["lo"]
    assert len((await intruder.run("cat /proc/net/route")).splitlines()) == 1


async def test_the_hosts_processes_are_out_of_reach(shared_world: World, pair: tuple[VmHandle, VmHandle]) -> None:
    inmate, neighbour = pair
    intruder = Intruder(inmate)
    assert neighbour.view.process is not None
    assert len([n for n in (await intruder.run("ls /proc")).split() if n.isdigit()]) <= 4  # QEMU, sh, ls
    for pid in (shared_world.pid, neighbour.view.process.pid, os.getpid()):
        assert "No such process" in await intruder.run(f"kill -0 {pid}")
        # Outside they are there, and belong to somebody else.
        assert "not permitted" in await intruder.run(f"kill -0 {pid}", inside=False)
        assert await intruder.run(f"head -c 1 /proc/{pid}/environ 2>/dev/null", inside=False) == ""


async def test_no_right_is_left(shared_world: World, pair: tuple[VmHandle, VmHandle]) -> None:
    uids = []
    for vm in pair:
        assert vm.view.process is not None
        status = Path(f"/proc/{vm.view.process.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(fields[name], 16) == 0, name
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
        assert fields["Groups"].split() == []
        assert len(set(fields["Uid"].split() + fields["Gid"].split())) == 1
        uids.append(int(fields["Uid"].split()[0]))
        for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
            theirs = os.readlink(f"/proc/{vm.view.process.pid}/ns/{kind}")
            assert theirs != os.readlink(f"/proc/{shared_world.pid}/ns/{kind}")
        assert int(Path(f"/proc/{vm.view.process.pid}/oom_score_adj").read_text()) > 0
    assert len({0, *uids}) == 3
    said = await Intruder(pair[0]).run(
        "touch /usr/x /etc/x /x 2>&1; ls -A /home /root /run/mica 2>/dev/null; mount -t tmpfs x /tmp"
    )
    assert said.count("Read-only file system") == 3
    assert "permission denied" in said.lower() or "must be superuser" in said.lower()


async def test_the_network_process_has_no_rights_either(shared_world: World, pair: tuple[VmHandle, VmHandle]) -> None:
    seen = 0
    for pid, words in shared_world.processes().items():
        if pair[0].id not in words or "/net/" not in words or "qemu-system" in words or "bwrap" in words:
            continue
        fields = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert int(fields["Uid"].split()[0]) not in (0, Intruder(pair[0]).uid), words
        assert int(fields["CapEff"], 16) == 0, words
        assert fields["NoNewPrivs"] == "1" or fields["Seccomp"] == "2", words
        seen += 1
    assert seen >= 1
