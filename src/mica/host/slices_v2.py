"""Slices on cgroup v2, below a directory that is ours. Source: Linux, Documentation/admin-guide/cgroup-v2.rst."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mica.host import slices_files as files
from mica.model.errors import Code, MicaError
from mica.model.units import Bytes
from mica.model.vm import ProcessRef
from mica.ports.slices import SliceLimits, SliceUsage

Attach = Callable[[Path, int], Awaitable[None]]
"""Puts a process into a group when we may not do so ourselves."""

_WANTED = ("cpu", "memory", "pids")


def controllers(directory: Path) -> list[str]:
    """Those of a group's controllers that we want. Raises ``host-lacks`` when none of them is of use."""
    try:
        there = frozenset((directory / "cgroup.controllers").read_text(encoding="ascii").split())
    except OSError as error:
        raise MicaError(Code.HOST_LACKS, f"{directory} is no control group: {error.strerror}") from error
    have = [name for name in _WANTED if name in there]
    if "cpu" not in have and "memory" not in have:
        raise MicaError(Code.HOST_LACKS, f"{directory} has neither the cpu nor the memory controller")
    return have


def enable(directory: Path) -> frozenset[str]:
    """Give the controllers of a group on to the groups below it; returns those that are there.

    Raises ``host-lacks`` when there are none of ours, or processes in the group itself forbid it.
    """
    have = controllers(directory)
    on = (directory / "cgroup.subtree_control").read_text(encoding="ascii").split()
    missing = [name for name in have if name not in on]
    if missing:
        files.write(directory / "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))
    return frozenset(have)


class SlicesV2:
    """Groups ``root/<vm id>``. ``controllers`` are those that reach them."""

    def __init__(
        self,
        root: Path,
        controllers: frozenset[str],
        *,
        proof: str = "",
        attach: Attach | None = None,
        pids: int = 4096,
        remove_timeout_s: float = 10.0,
    ) -> None:
        self._root = root
        self._controllers = controllers
        self._attach = attach
        self._pids = pids
        self._remove_timeout_s = remove_timeout_s
        self.proof = proof

    @property
    def reduced(self) -> tuple[str, ...]:
        words = {"cpu": "CPU time", "memory": "memory"}
        return tuple(
            f"{word} of VMs is not limited: the {name} controller is not delegated to us"
            for name, word in words.items()
            if name not in self._controllers
        )

    async def create(self, vm_id: str, limits: SliceLimits) -> dict[str, Any]:
        directory = self._root / files.check_id(vm_id)
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise MicaError(Code.HOST_LACKS, f"cannot make {directory}: {error.strerror}") from error
        self._set(directory, limits)
        if "pids" in self._controllers:
            files.write(directory / "pids.max", str(self._pids))
        return {"kind": "v2", "path": str(directory)}

    async def join(self, handle: dict[str, Any], pid: int) -> None:
        directory = Path(handle["path"])
        try:
            files.join([directory], pid)
        except MicaError as error:
            if error.code is not Code.HOST_LACKS or self._attach is None:
                raise
            await self._attach(directory, pid)

    async def update(self, handle: dict[str, Any], limits: SliceLimits) -> None:
        directory = Path(handle["path"])
        if limits.memory is not None:
            files.refuse_below_use(limits.memory, _fixed(directory), directory.name)
        self._set(directory, limits)

    def _set(self, directory: Path, limits: SliceLimits) -> None:
        if "cpu" in self._controllers:
            quota = "max" if limits.cpus is None else str(files.quota_us(limits.cpus))
            files.write(directory / "cpu.max", f"{quota} {files.PERIOD_US}")
        if "memory" in self._controllers:
            files.write(directory / "memory.max", "max" if limits.memory is None else str(limits.memory))

    async def usage(self, handle: dict[str, Any], process: ProcessRef | None = None) -> SliceUsage:
        directory = Path(handle["path"])
        if not directory.is_dir():
            raise MicaError(Code.GONE, f"the control group {directory} is gone")
        spent = files.fields(directory / "cpu.stat").get("usage_usec")
        memory = files.number(directory / "memory.current")
        counted = SliceUsage(
            cpu_s=None if spent is None else spent / 1e6,
            memory=None if memory is None else Bytes(memory),
            oom_kills=files.fields(directory / "memory.events").get("oom_kill", 0),
        )
        return files.completed(counted, process)

    async def remove(self, handle: dict[str, Any]) -> None:
        await files.remove([Path(handle["path"])], self._remove_timeout_s)

    def retire(self) -> None:
        files.retire([self._root])

    def present(self) -> dict[str, dict[str, Any]]:
        try:
            entries = [entry for entry in self._root.iterdir() if entry.is_dir() and not entry.name.startswith("mica-")]
        except FileNotFoundError:
            return {}
        return {entry.name: {"kind": "v2", "path": str(entry)} for entry in entries}


def _fixed(directory: Path) -> int:
    """Memory that the kernel cannot take back by dropping page cache; shared memory holds the guest's RAM."""
    seen = files.fields(directory / "memory.stat")
    return seen.get("anon", 0) + seen.get("shmem", 0) + seen.get("kernel", 0)
