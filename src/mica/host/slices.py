"""Slices: the CPU time and memory that a VM may take, held by the kernel's control groups.

Every VM has a group of its own. The groups of all VMs lie beside the daemon's group, not in it, so that stopping the
daemon's service does not take the VMs along. Which kind of control groups this host has is asked, in this order:

    systemd present, cgroup v2 ──► a delegated unit of ours (slices_systemd), then v2 below it
    cgroup v2, root            ──► a group of ours at the top
    cgroup v2, own group ours  ──► groups below our own
    cgroup v1, root            ──► a group of ours in each of cpu, cpuacct, memory, pids
    otherwise                  ──► none, which says why

Guest RAM lies in a file in tmpfs: the kernel charges its pages to the group that touched them first, so the memory of
a fork's base counts for whoever read it first, and a page stays charged until the file is gone. Swap is not limited.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mica.host import facts
from mica.host.slices_files import completed
from mica.host.slices_systemd import SystemdUnit
from mica.host.slices_v1 import CONTROLLERS, SlicesV1
from mica.host.slices_v2 import Attach, SlicesV2, controllers, enable
from mica.model.errors import MicaError
from mica.model.vm import ProcessRef
from mica.ports.slices import SliceLimits, SliceUsage

__all__ = ["HostSlices", "NoSlices", "detect"]


class HostSlices(Protocol):
    """The port, and what only this host's other adapters and ``doctor`` ask."""

    @property
    def proof(self) -> str:
        """How the groups are made, for ``doctor``."""

    @property
    def reduced(self) -> tuple[str, ...]:
        """What this host cannot enforce."""

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]: ...

    async def join(self, handle: dict[str, Any], pid: int) -> None:
        """Put a process into the group, with what it has used so far left behind."""

    async def update(self, handle: dict[str, Any], limits: SliceLimits) -> None: ...

    async def usage(self, handle: dict[str, Any], process: ProcessRef | None = None) -> SliceUsage: ...

    async def remove(self, handle: dict[str, Any]) -> None: ...

    def present(self) -> dict[str, dict[str, Any]]:
        """VM id → handle of every group there is, for the reaper."""

    def retire(self) -> None:
        """The daemon ends: remove the groups above the VMs' where no VM is left in them."""


class NoSlices(msgspec.Struct, frozen=True):
    """A host without usable control groups: VMs run without ceilings, and everybody is told. Use is still seen."""

    reason: str
    hint: str = ""

    @property
    def proof(self) -> str:
        return self.reason

    @property
    def reduced(self) -> tuple[str, ...]:
        return (f"CPU and memory of VMs are not limited: {self.reason}",)

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]:
        return {}

    async def join(self, handle: dict[str, Any], pid: int) -> None:
        return None

    async def update(self, handle: dict[str, Any], limits: SliceLimits) -> None:
        return None

    async def usage(self, handle: dict[str, Any], process: ProcessRef | None = None) -> SliceUsage:
        return completed(SliceUsage(None, None), process)

    async def remove(self, handle: dict[str, Any]) -> None:
        return None

    def present(self) -> dict[str, dict[str, Any]]:
        return {}

    def retire(self) -> None:
        return None


async def detect(
    *, root: bool, prefix: str, host: Path = Path("/"), environment: Mapping[str, str] | None = None
) -> HostSlices:
    """The best way this host offers. ``prefix`` names this daemon's groups and keeps them apart from another's.

    ``environment`` reaches systemd's tools: a user's manager is found by XDG_RUNTIME_DIR. Never raises for a host that
    lacks something: the answer is then :class:`NoSlices`, with the reason.
    """
    groups = facts.own_groups(host)
    unified = groups.get("")
    wanted = [groups[name] for name in CONTROLLERS if name in groups]
    if unified is not None and not wanted:
        return await _unified(unified, root, prefix, host, environment or {})
    if wanted:
        return _legacy(groups, root, prefix)
    return NoSlices("no control groups are mounted", "mount cgroup2 on /sys/fs/cgroup, or boot with systemd")


async def _unified(own: facts.Group, root: bool, prefix: str, host: Path, environment: Mapping[str, str]) -> HostSlices:
    failures = []
    if (host / "run/systemd/system").is_dir():
        unit = SystemdUnit(f"{prefix}-vms.service", user=not root, environment=dict(environment), mount=own.mount)
        try:
            directory = await unit.start()
            return await _below(directory, f"unit {unit.name}, delegated by systemd", unit.attach)
        except MicaError as error:
            failures.append(str(error))
    try:
        if root and own.mount.stat().st_uid == os.geteuid():
            await asyncio.to_thread(enable, own.mount)
            return await _below(own.mount / prefix, f"cgroup v2 at {own.mount / prefix}")
        if os.access(own.directory, os.W_OK) and os.access(own.directory / "cgroup.procs", os.W_OK):
            await asyncio.to_thread(_move_down, own.directory)
            return await _below(own.directory / prefix, f"cgroup v2 below our own, {own.directory}")
        failures.append(f"{own.directory} is not ours to divide")
    except (MicaError, OSError) as error:
        failures.append(str(error))
    hint = "" if root else "run the daemon as a service of your user (systemd-run --user -p Delegate=yes), or as root"
    return NoSlices("; ".join(failures), hint)


async def _below(directory: Path, proof: str, attach: Attach | None = None) -> SlicesV2:
    await asyncio.to_thread(directory.mkdir, exist_ok=True)
    have = await asyncio.to_thread(enable, directory)
    return SlicesV2(directory, have, proof=proof, attach=attach)


def _move_down(directory: Path) -> None:
    """A group that gives controllers on may hold no process itself (cgroups(7)): step into one below it."""
    controllers(directory)  # nothing is moved for nothing
    own = directory / "mica-daemon"
    own.mkdir(exist_ok=True)
    (own / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    try:
        enable(directory)
    except MicaError:
        (directory / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        own.rmdir()
        raise


def _legacy(groups: dict[str, facts.Group], root: bool, prefix: str) -> HostSlices:
    hint = "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1) to have them as an ordinary user"
    if not root:
        return NoSlices("this host has cgroup v1, where only root can make groups", hint)
    roots: dict[str, Path] = {}
    failures = []
    for name in CONTROLLERS:
        if name in groups:
            directory = groups[name].mount / prefix
            try:
                directory.mkdir(exist_ok=True)
            except OSError as error:
                failures.append(f"{directory}: {error.strerror}")
            else:
                roots[name] = directory
    if not roots:
        return NoSlices("; ".join(failures), "in a container, mount /sys/fs/cgroup writable")
    return SlicesV1(roots)
