"""Forks and snapshots: until a copy's agent has answered, how long its original stands still, what they take."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.table import Row, median
from mica import Client
from mica.client.handle import VmHandle
from mica.model.units import GIB, MIB, Bytes
from mica.model.views import SnapshotSet, TemplateCreate

RUNS = 3
SMALL, LARGE, MANY_OF = Bytes(256 * MIB), Bytes(4 * GIB), Bytes(512 * MIB)
MANY = 20
FILLED_S = 60.0
WRITTEN_MIB = 50


async def forks(client: Client) -> list[Row]:
    """Everything of one 256 MiB guest beside its own cold start, and a 4 GiB one beside it."""
    began = time.monotonic()
    small = await client.run("micro", name="small", memory=SMALL)
    cold_s = time.monotonic() - began
    large = await client.run("micro", name="large", memory=LARGE)
    try:
        first = await small.snapshot("first")
        fork_s = median([await _fork_s(small, number) for number in range(RUNS)])
        await large.snapshot("first", description="so that both are children of their memory")
        large_s = median([await _fork_s(large, number) for number in range(RUNS)])
        taken_s, size = await _second_s(small)
        restore_s = await _restore_s(small)
        standby_s = await _standby_s(client, small)
    finally:
        await small.remove()
        await large.remove()
    return [
        Row("fork of a 256 MiB guest, request to its agent's answer", fork_s, 0.20, "s", f"cold start {cold_s:.2f} s"),
        Row("the same of a template, from standby", standby_s, 0.12, "s"),
        Row("the same of a 4 GiB guest", large_s / fork_s, 1.20, "", f"{large_s:.2f} s"),
        Row("pause of the original, first snapshot", first.snapshot.pause_s or 0.0, 0.25, "s"),
        Row("snapshot with memory after 50 MiB of writes", taken_s, 0.5, "s", f"{size / MIB:.0f} MiB on disk"),
        Row("its space on disk, beside what was written", size / (WRITTEN_MIB * MIB), 1.3, ""),
        Row("restore of a running state", restore_s, 0.3, "s"),
        *await _many(client),
    ]


async def _fork_s(vm: VmHandle, number: int) -> float:
    began = time.monotonic()
    (copy,) = await vm.fork(name=f"{vm.name}-{number}")
    took = time.monotonic() - began
    await copy.remove()
    return took


async def _standby_s(client: Client, vm: VmHandle) -> float:
    """What runs a template of which one waits, each time."""
    await client.templates.create(TemplateCreate(vm=vm.id, name="waiting"))
    try:
        await client.templates.set("waiting", SnapshotSet(standby=1))
        took = []
        for number in range(RUNS):
            async with asyncio.timeout(FILLED_S):
                while not (await client.templates.get("waiting")).standing_by:
                    await asyncio.sleep(0.2)
            began = time.monotonic()
            copy = await client.run("waiting", name=f"{vm.name}-taken-{number}")
            took.append(time.monotonic() - began)
            await copy.remove()
    finally:
        await client.templates.delete("waiting")
    return median(took)


async def _second_s(vm: VmHandle) -> tuple[float, int]:
    await vm.exec("sh", "-c", f"head -c {WRITTEN_MIB * MIB} /dev/urandom > /tmp/written")
    began = time.monotonic()
    taken = await vm.snapshot("second")
    return time.monotonic() - began, taken.size


async def _restore_s(vm: VmHandle) -> float:
    took = []
    for _ in range(RUNS):
        began = time.monotonic()
        await vm.restore_snapshot("first", keep=False)
        took.append(time.monotonic() - began)
    return median(took)


async def _many(client: Client) -> list[Row]:
    parent = await client.run("micro", name="parent", memory=MANY_OF)
    copies: list[VmHandle] = []
    try:
        await parent.snapshot("moment")
        began = time.monotonic()
        copies = list(await parent.fork(count=MANY, name="copy"))
        took = time.monotonic() - began
        each = [await asyncio.to_thread(_pss_mib, copy.id) for copy in copies]
    finally:
        await asyncio.gather(*(copy.remove() for copy in copies))
        await parent.remove()
    return [
        Row(f"{MANY} forks of one 512 MiB guest", took, 12.0 * MANY / 50, "s"),
        Row("memory of each (PSS of QEMU, network and jail)", median(each), 70, "MiB"),
    ]


def _pss_mib(vm_id: str) -> float:
    """Memory of all processes that name the VM, shared pages by their share (``smaps_rollup``, proc(5))."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if vm_id.encode() in (entry / "cmdline").read_bytes():
                lines = (entry / "smaps_rollup").read_text(encoding="ascii").splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total / 1024
