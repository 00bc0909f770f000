"""Slices on cgroup v1: one group in each hierarchy that the host mounts.

Source: Linux, Documentation/admin-guide/cgroup-v1 (memory.rst, cpuacct.rst, pids.rst) and scheduler/sched-bwc.rst.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mica.host import slices_files as files
from mica.model.errors import Code, MicaError
from mica.model.units import Bytes
from mica.model.vm import ProcessRef
from mica.ports.slices import SliceLimits, SliceUsage

CONTROLLERS = ("cpu", "cpuacct", "memory", "pids")


class SlicesV1:
    """Groups ``roots[controller]/<vm id>``. Hierarchies may share a mount, as cpu and cpuacct often do."""

    def __init__(self, roots: dict[str, Path], *, pids: int = 4096, remove_timeout_s: float = 10.0) -> None:
        self._roots = roots
        self._pids = pids
        self._remove_timeout_s = remove_timeout_s

    @property
    def proof(self) -> str:
        return f"cgroup v1: {', '.join(str(root) for root in dict.fromkeys(self._roots.values()))}"

    @property
    def reduced(self) -> tuple[str, ...]:
        words = {"cpu": "CPU time", "memory": "memory"}
        return tuple(
            f"{word} of VMs is not limited: the {name} controller cannot be used here"
            for name, word in words.items()
            if name not in self._roots
        )

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]:
        files.check_id(vm_id)
        paths = {name: root / vm_id for name, root in self._roots.items()}
        for directory in paths.values():
            try:
                directory.mkdir(exist_ok=True)
            except OSError as error:
                raise MicaError(Code.HOST_LACKS, f"cannot make {directory}: {error.strerror}") from error
        handle: dict[str, Any] = {"kind": "v1", "paths": {name: str(path) for name, path in paths.items()}}
        self._set(paths, limits)
        if "pids" in paths:
            files.write(paths["pids"] / "pids.max", str(self._pids))
        return handle

    async def join(self, handle: dict[str, Any], pid: int) -> None:
        files.join(_directories(handle), pid)

    async def update(self, handle: dict[str, Any], limits: SliceLimits) -> None:
        paths = _paths(handle)
        if limits.memory is not None and "memory" in paths:
            files.refuse_below_use(limits.memory, _fixed(paths["memory"]), paths["memory"].name)
        self._set(paths, limits)

    def _set(self, paths: dict[str, Path], limits: SliceLimits) -> None:
        if "cpu" in paths:
            files.write(paths["cpu"] / "cpu.cfs_period_us", str(files.PERIOD_US))
            quota = -1 if limits.cpus is None else files.quota_us(limits.cpus)
            files.write(paths["cpu"] / "cpu.cfs_quota_us", str(quota))
        if "memory" in paths:
            limit = -1 if limits.memory is None else limits.memory
            files.write(paths["memory"] / "memory.limit_in_bytes", str(limit))

    async def usage(self, handle: dict[str, Any], process: ProcessRef | None = None) -> SliceUsage:
        paths = _paths(handle)
        if not any(path.is_dir() for path in paths.values()):
            raise MicaError(Code.GONE, f"the control groups {', '.join(map(str, paths.values()))} are gone")
        spent = files.number(paths["cpuacct"] / "cpuacct.usage") if "cpuacct" in paths else None
        memory = files.number(paths["memory"] / "memory.usage_in_bytes") if "memory" in paths else None
        kills = files.fields(paths["memory"] / "memory.oom_control").get("oom_kill", 0) if "memory" in paths else 0
        counted = SliceUsage(
            cpu_s=None if spent is None else spent / 1e9,
            memory=None if memory is None else Bytes(memory),
            oom_kills=kills,
        )
        return files.completed(counted, process)

    async def remove(self, handle: dict[str, Any]) -> None:
        await files.remove(_directories(handle), self._remove_timeout_s)

    def present(self) -> dict[str, dict[str, Any]]:
        roots = [root for root in self._roots.values() if root.is_dir()]
        names = {entry.name for root in roots for entry in root.iterdir() if entry.is_dir()}
        return {
            name: {"kind": "v1", "paths": {key: str(root / name) for key, root in self._roots.items()}}
            for name in sorted(names)
            if not name.startswith("mica-")
        }

    def retire(self) -> None:
        files.retire(self._roots.values())


def _paths(handle: dict[str, Any]) -> dict[str, Path]:
    return {name: Path(path) for name, path in handle.get("paths", {}).items()}


def _directories(handle: dict[str, Any]) -> list[Path]:
    return list(dict.fromkeys(_paths(handle).values()))


def _fixed(directory: Path) -> int:
    """Memory that the kernel cannot take back by dropping page cache; shared memory holds the guest's RAM."""
    seen = files.fields(directory / "memory.stat")
    return seen.get("total_rss", 0) + seen.get("total_shmem", seen.get("shmem", 0))
