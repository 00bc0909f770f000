"""``python -m bench [NAME …]``: run the benchmarks (all of them) and print the performance table.

Each number is the median of a few runs, measured beside what it is compared with, on whatever host this is.
"""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench import forks, guests, processes
from bench.table import Row, show
from bench.world import world
from mica import Client

BENCHMARKS: dict[str, Callable[[Client], Awaitable[list[Row]]]] = {
    "cli": processes.cli,
    "rest": processes.rest,
    "start": guests.start,
    "exec": guests.exec_,
    "adopt": guests.adopt,
    "fork": forks.forks,
    "many": guests.many,
}


async def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    async with world() as client:
        host = await client.host()
        for name in names or BENCHMARKS:
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            rows += await BENCHMARKS[name](client)
    cpu = next(
        (li.partition(": ")[2] for li in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in li), ""
    )
    show(
        rows, f"{host.cpus} × {cpu.strip()}, {host.accelerator}, QEMU {host.qemu}, Python {platform.python_version()}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
