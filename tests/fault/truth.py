"""Whether what a daemon says is what is: its store, its answers and this host agree about every VM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from mica.client import Client
from mica.host.processes import find
from mica.model.operation import OperationState
from mica.model.views import VmView
from mica.model.vm import VmState
from tests.integration.world import World

AT_REST = frozenset({VmState.STOPPED, VmState.RUNNING, VmState.PAUSED, VmState.CRASHED, VmState.TRASHED})


async def all_vms(client: Client) -> list[VmView]:
    return [vm.view for trashed in (False, True) for vm in await client.vms.list(trashed=trashed)]


async def rest(client: Client, *, timeout_s: float = 45.0) -> list[VmView]:
    """Wait until nothing is under way any more."""
    async with asyncio.timeout(timeout_s):
        while True:
            active = await client.operations.list(active=True)
            vms = await all_vms(client)
            if not active and all(vm.observed.state in AT_REST and not vm.operations for vm in vms):
                return vms
            stuck = [o for o in active if o.state is OperationState.STUCK]
            assert not stuck, f"an operation is stuck: {stuck}"
            await asyncio.sleep(0.05)


def rows(world: World, kind: str) -> dict[str, Any]:
    with contextlib.closing(sqlite3.connect(world.home / "state.db", timeout=10)) as database:
        found = database.execute("SELECT id, value FROM rows WHERE kind = ?", (kind,)).fetchall()
    return {id_: json.loads(value) for id_, value in found}


def lies(world: World, vms: list[VmView]) -> list[str]:
    """Everything in which the host is not as the views say."""
    out: list[str] = []
    live: dict[str, VmView] = {}
    for vm in vms:
        runs = vm.observed.state in (VmState.RUNNING, VmState.PAUSED)
        process = find(vm.process) if vm.process is not None else None
        if process is not None:
            process.close()
        if runs:
            live[vm.id] = vm
        if runs != (process is not None):
            out.append(f"{vm.name} is {vm.observed.state} and its process is {process}")
        if (
            vm.observed.state is not VmState.CRASHED
            and vm.observed.problem
            and "fault in Mica" in vm.observed.problem.message
        ):
            out.append(f"{vm.name}: {vm.observed.problem}")
    pids = sorted(vm.process.pid for vm in live.values() if vm.process is not None)
    if world.qemus() != pids:
        out.append(f"QEMUs {world.qemus()} run, {pids} should")
    ids = {vm.id for vm in vms}
    out += [f"process of nobody: {words[:300]}" for words in world.processes().values() if not _named(words, set(live))]
    for directory, known, must in _directories(world, set(live), ids):
        if directory.is_dir():
            present = {entry.name for entry in directory.iterdir() if not entry.name.startswith(".")}
            out += [f"left over: {directory / name}" for name in present - known]
            if must:
                out += [f"missing: {directory / name}" for name in known - present]
    out += [f"control group of nobody: {group}" for group in world.groups() if group.name not in live]
    out += _ledger(world, live)
    out += _parts(world)
    return out + _claims(world, vms)


def _named(words: str, ids: set[str]) -> bool:
    return any(id_ in words for id_ in ids)


def _directories(world: World, live: set[str], ids: set[str]) -> list[tuple[Path, set[str], bool]]:
    """Where VMs have something, which ones may, and whether those must."""
    return [
        (world.runtime / "vm", live, True),
        (world.runtime / "net", live, True),
        (world.home / "volumes", ids, False),
        (world.home / "logs", ids, False),
    ]


def _parts(world: World) -> list[str]:
    """Where nothing is under way: rows and files of parts, what is on its way to be one, layers that nobody took."""
    known, directory = rows(world, "part"), world.home / "parts"
    out = [
        f"layer {p} of {vm['name']} is not known"
        for vm in rows(world, "vm").values()
        for p in vm["layers"].values()
        if p not in known
    ]
    for snapshot in rows(world, "snapshot").values():
        if snapshot.get("state") == "complete" and snapshot.get("kind", "user") in ("user", "safety"):
            memory = snapshot.get("memory") or {}
            ids = [*snapshot.get("disks", {}).values(), *(memory.get(k, "") for k in ("ram", "changes", "devices"))]
            out += [
                f"snapshot {snapshot['name']} needs {i}, which is not there"
                for i in ids
                if i and not (i in known and (directory / i).exists())
            ]
    if (directory / ".scratch").is_dir():
        merging = {f"merge-{id_}" for id_, part in known.items() if part.get("merging")}  # the next round goes on
        out += [f"left over: {entry}" for entry in (directory / ".scratch").iterdir() if entry.name not in merging]
    return out + [f"staged by nobody: {file}" for file in (world.home / "volumes").glob("*/.*.staged.json")]


def _ledger(world: World, live: dict[str, VmView]) -> list[str]:
    reserved: dict[str, Any] = rows(world, "ledger").get("memory", {}).get("reserved", {})
    out = [f"memory promised to {id_}, which does not run" for id_ in reserved.keys() - live.keys()]
    out += [f"no memory promised to {vm.name}, which runs" for id_, vm in live.items() if id_ not in reserved]
    return out


def _claims(world: World, vms: list[VmView]) -> list[str]:
    names = {name: claim["holder"] for name, claim in rows(world, "vm.name").items()}
    wanted = {vm.name: vm.id for vm in vms if vm.deleted_at is None}
    return [f"names are {names}, not {wanted}"] if names != wanted else []


async def honest(world: World, client: Client, *, timeout_s: float = 20.0) -> list[VmView]:
    """Wait for rest, then for the truth: what loops put right is given its time. Fails with what stays a lie."""
    vms = await rest(client)
    found = lies(world, vms)
    async with asyncio.timeout(timeout_s + 30):
        waited = 0.0
        while found and waited < timeout_s:
            await asyncio.sleep(0.25)
            waited += 0.25
            vms = await rest(client)
            found = lies(world, vms)
    assert not found, "\n".join(found)
    return vms
