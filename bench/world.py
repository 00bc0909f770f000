"""A daemon of the benchmark's own, and what is measured about processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mica import Client
from mica.client import daemon

HOME = Path(__file__).resolve().parent.parent / ".cache" / "bench"
MICA = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "mica"


@asynccontextmanager
async def world() -> AsyncIterator[Client]:
    """A client of a fresh daemon with the image micro; every VM of it is gone afterwards, and so is the daemon."""
    HOME.mkdir(parents=True, exist_ok=True)
    # What is measured is a boot, not a copy of an earlier one.
    (HOME / "config.toml").write_text('boot_once = "false"\n', encoding="utf-8")
    place = daemon.locate(HOME, os.environ, os.geteuid())
    try:
        async with Client(home=HOME) as client:
            await client.host()
            await client.images.ensure("micro")
            for vm in await client.vms.list():
                await vm.remove()
            yield client
    finally:
        if await daemon.answers(place):
            async with Client(home=HOME, autostart=False) as client:
                await asyncio.gather(*(vm.remove() for vm in await client.vms.list()))
            await daemon.stop(place, timeout_s=60)


def rss_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def command_s(*arguments: str) -> float:
    """Seconds that one ``mica`` command takes, the whole process."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        MICA,
        *arguments,
        env={**os.environ, "MICA_HOME": str(HOME)},
        stdout=asyncio.subprocess.DEVNULL,
    )
    if await process.wait() != 0:
        raise RuntimeError(f"mica {' '.join(arguments)} failed")
    return time.monotonic() - began
