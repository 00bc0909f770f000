"""The command line and the daemon at rest."""

from __future__ import annotations

import asyncio

from bench.table import Row, median
from bench.world import command_s, cpu_s, rss_mib
from mica import Client
from mica.model.views import VmCreate

RUNS = 7


async def cli(client: Client) -> list[Row]:
    """Whole processes, from exec to exit, with ten VMs in the list."""
    names = [f"listed-{n}" for n in range(10)]
    for name in names:
        await client.vms.create(VmCreate(name=name, image="micro"))
    help_s = median([await command_s("--help") for _ in range(RUNS)])
    list_s = median([await command_s("vm", "list") for _ in range(RUNS)])
    for name in names:
        await client.vms.delete(name, purge=True)
    return [
        Row("mica --help, whole process", help_s, 0.15, "s"),
        Row("mica vm list with 10 VMs, whole process", list_s, 0.30, "s", f"--help {help_s:.2f} s"),
    ]


async def rest(client: Client) -> list[Row]:
    """The daemon with nothing to do, over ten seconds."""
    pid = (await client.host()).pid
    before = cpu_s(pid)
    await asyncio.sleep(10)
    return [
        Row("daemon at rest, resident", rss_mib(pid), 80, "MiB"),
        Row("daemon at rest, of one core", (cpu_s(pid) - before) * 10, 1.0, "%"),
    ]
