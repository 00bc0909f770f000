"""Guests: how much Mica adds to what QEMU and the guest themselves take."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from bench.table import Row, median
from bench.world import HOME, cpu_s, rss_mib
from mica import Client
from mica.client.handle import VmHandle
from mica.guest.agent import GuestAgent
from mica.model.units import MIB, Bytes
from mica.model.views import VmCreate
from mica.model.vm import AgentState, VmState

RUNS = 3
MEMORY = Bytes(256 * MIB)
SMALL = Bytes(128 * MIB)
# Fifty boots one after the other would take longer than that only where nothing can be measured anyway. Seconds.
MANY_START_S = 900


async def _by_hand_s(argv: list[str], directory: Path) -> float:
    """The same QEMU command, run by hand without jail, slice and network process, until its agent answers."""
    agent = GuestAgent(directory / "agent", guest="the guest run by hand")
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.DEVNULL)
    try:
        while not (directory / "agent").exists():
            await asyncio.sleep(0.002)
        await agent.wait_ready(60)
        await agent.ping()
        return time.monotonic() - began
    finally:
        await agent.close()
        process.kill()
        await process.wait()


def _own_files(argv: list[str], run_dir: str, directory: Path) -> list[str]:
    """The command line of a running VM, with files of its own, an unplugged NIC, and vCPUs that run at once."""
    out = []
    for word in argv:
        if word == "-S":
            continue
        text = word.replace(run_dir, str(directory))
        if '"type":"stream"' in text:
            text = '{"type":"hubport","id":"net-net0","hubid":1000}'
        if '"qom-type":"memory-backend-file"' in text:
            (directory / "ram").unlink(missing_ok=True)
            start = text.index('"mem-path":"') + len('"mem-path":"')
            text = text[:start] + str(directory / "ram") + text[text.index('"', start) :]
        if "logfile=" in text:
            before, _, after = text.partition("logfile=")
            text = f"{before}logfile={directory / 'console.log'}{after[after.index(',') :]}"
        out.append(text)
    return out


async def start(client: Client) -> list[Row]:
    """Start of ``micro`` to its agent's first answer, and to the 202, side by side with the same command by hand."""
    body = VmCreate(name="timed", image="micro", memory=MEMORY)
    await client.vms.create(body)
    ours, accepted, by_hand = [], [], []
    directory = Path(tempfile.mkdtemp(prefix="mica-bench-", dir="/dev/shm"))
    try:
        for _ in range(RUNS):
            began = time.monotonic()
            operation = await client.vms.start("timed", wait=False)
            accepted.append(time.monotonic() - began)
            await client.operations.wait(operation.id)
            view = await client.vms.wait_agent("timed")
            ours.append(time.monotonic() - began)
            assert view.process is not None
            argv = Path(f"/proc/{view.process.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
            run_dir = str(Path(next(w for w in argv if "id=qmp0" in w).split("path=")[1].split(",")[0]).parent)
            await client.vms.stop("timed", force=True)
            for name in ("agent", "qmp", "rescue", "serial"):
                (directory / name).unlink(missing_ok=True)
            by_hand.append(await _by_hand_s(_own_files(argv, run_dir, directory), directory))
    finally:
        shutil.rmtree(directory)
        await client.vms.delete("timed", purge=True, force=True)
    ratio = median(ours) / median(by_hand)
    return [
        Row("start of micro to first agent answer", ratio, 1.10, "", f"by hand {median(by_hand):.2f} s"),
        Row("start accepted (202)", median(accepted) * 1000, 20, "ms"),
    ]


async def exec_(client: Client) -> list[Row]:
    """An exec round trip through API and client, beside the agent's own guest-exec and guest-exec-status."""
    async with await client.run("micro", memory=MEMORY, rm=True) as vm:
        view = await vm.refresh()
        assert view.process is not None
        argv = Path(f"/proc/{view.process.pid}/cmdline").read_bytes().decode().split("\0")
        port = next(w for w in argv if "id=agent0" in w).split("path=")[1].split(",")[0]
        for _ in range(10):  # a guest that has just booted has other things to do yet
            await vm.exec("true")
        through = []
        for _ in range(40):
            began = time.monotonic()
            await vm.exec("true")
            through.append(time.monotonic() - began)
        # The agent's port takes one client, so the daemon is stopped while the agent is asked directly.
        pid = (await client.host()).pid
        os.kill(pid, signal.SIGSTOP)
        own = await _agent_alone_s(Path(port), pid)
    above = (median(through) - own) * 1000
    return [Row("exec round trip above the agent's own", above, 15, "ms", f"agent {own * 1000:.1f} ms")]


async def _agent_alone_s(port: Path, daemon: int) -> float:
    os.kill(daemon, signal.SIGKILL)
    agent = GuestAgent(port)
    try:
        await agent.wait_ready(30)
        times = []
        for _ in range(40):
            began = time.monotonic()
            pid = await agent.exec_raw("/bin/true")
            await agent.exec_wait(pid, timeout_s=10)
            times.append(time.monotonic() - began)
        return median(times)
    finally:
        await agent.close()


async def _start_many(client: Client, count: int) -> list[VmHandle]:
    for n in range(count):
        await client.vms.create(VmCreate(name=f"many-{n}", image="micro", memory=SMALL, display=False))
    # A few at a time: booting is processor time, and the point is what comes after.
    gate = asyncio.Semaphore(4)

    async def one(n: int) -> None:
        async with gate:
            await client.vms.start(f"many-{n}")
            await client.vms.wait_agent(f"many-{n}", timeout_s=120)

    await asyncio.gather(*(one(n) for n in range(count)))
    return [vm for vm in await client.vms.list() if vm.name.startswith("many-")]


async def _all_adopted(client: Client, count: int) -> None:
    while True:
        vms = [vm for vm in await client.vms.list() if vm.name.startswith("many-")]
        ready = [v for v in vms if v.state is VmState.RUNNING and v.view.observed.agent is AgentState.READY]
        operations = await client.operations.list(active=True)
        if len(ready) == count and not operations:
            return
        await asyncio.sleep(0.01)


async def adopt(client: Client) -> list[Row]:
    """Twenty VMs under a daemon that is killed: from the new daemon's start until it has them all in hand."""
    vms = await _start_many(client, 20)
    try:
        os.kill((await client.host()).pid, signal.SIGKILL)
        began = time.monotonic()
        async with Client(home=HOME) as fresh:
            await fresh.host()
            await _all_adopted(fresh, 20)
        took = time.monotonic() - began
    finally:
        await asyncio.gather(*(vm.remove() for vm in vms))
    return [Row("20 VMs adopted by a new daemon", took, 2.0, "s")]


async def many(client: Client) -> list[Row]:
    """The daemon with 50 running VMs."""
    async with asyncio.timeout(MANY_START_S):
        vms = await _start_many(client, 50)
    try:
        pid = (await client.host()).pid
        await asyncio.sleep(5)
        before = cpu_s(pid)
        await asyncio.sleep(20)
        busy = (cpu_s(pid) - before) / 20 * 100
        return [
            Row("daemon with 50 VMs, resident", rss_mib(pid), 120, "MiB"),
            Row("daemon with 50 VMs, of one core", busy, 1.0, "%"),
        ]
    finally:
        await asyncio.gather(*(vm.remove() for vm in vms))
