"""Facts about this host that admission and ``mica doctor`` judge by, read from ``/proc``, ``/sys`` and the kernel.

Everything here takes well under a millisecond, so it is asked again each time instead of kept: memory that was free
a second ago is not a fact. Sources: proc(5), cgroups(7), and the kernel's ``Documentation/admin-guide/cgroup-v2.rst``
and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from mica.model.doctor import HostFacts
from mica.model.errors import Code, MicaError
from mica.model.units import Bytes

__all__ = ["HostFacts", "Memory", "own_groups", "read_boot_id", "read_facts", "read_memory"]

# Above this a limit means "none": cgroup v1 writes its "unlimited" as LONG_MAX rounded down to a page.
_UNLIMITED = 1 << 60


class Memory(NamedTuple):
    """``total`` and ``available`` respect ``limit``, the tightest control group limit above us. All in bytes."""

    host: Bytes
    total: Bytes
    available: Bytes
    limit: Bytes | None
    swap_total: Bytes
    swap_free: Bytes


class Group(NamedTuple):
    """Our control group for one controller: its directory, the directory its hierarchy is mounted on, its version."""

    directory: Path
    mount: Path
    version: int

    def upwards(self) -> list[Path]:
        """Our group and those above it, as far as they can be seen from here."""
        out = [self.directory]
        while out[-1] != self.mount:
            out.append(out[-1].parent)
        return out


class _Mount(NamedTuple):
    root: str
    point: str
    kind: str
    options: tuple[str, ...]


def _text(path: Path) -> str | None:
    """The file's text, or ``None`` where it does not exist or may not be read: absence is an answer here."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _mounts(root: Path) -> list[_Mount]:
    """``/proc/self/mountinfo`` (proc(5)): optional fields end at a lone ``-``."""
    out = []
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(), tail.split()
        if len(fields) >= 5 and len(rest) >= 3:
            point = fields[4].replace("\\040", " ")
            out.append(_Mount(fields[3], point, rest[0], tuple(rest[2].split(","))))
    return out


def _below(path: str, root: str) -> str:
    """The group ``path`` relative to a mount that shows the hierarchy from ``root`` on."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    # "/.." is a group outside of our cgroup namespace: all that we can see of it is the mount itself.
    return "" if path.startswith("/..") else path.strip("/")


def own_groups(root: Path = Path("/")) -> dict[str, Group]:
    """Controller → the group this process is in, from ``/proc/self/cgroup``; the unified hierarchy is ``""``."""
    mounts = _mounts(root)
    out: dict[str, Group] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, names, path = [*line.split(":", 2), "", ""][:3]
        for name in names.split(","):
            for mount in mounts:
                unified = number == "0" and not names and mount.kind == "cgroup2"
                if unified or (names and mount.kind == "cgroup" and name in mount.options):
                    point = root / mount.point.lstrip("/")
                    directory = point / _below(path, mount.root)
                    if not directory.is_dir():
                        directory = point
                    out[name] = Group(directory, point, 2 if unified else 1)
    return out


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _stat(path: Path, *names: str) -> int:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key in names and value.strip().isdigit():
            return int(value)
    return 0


def _group_memory(groups: dict[str, Group]) -> tuple[int | None, int | None]:
    """The tightest memory limit above us, and the least that the groups with a limit still have to give."""
    group = groups.get("memory") or groups.get("")
    limit: int | None = None
    available: int | None = None
    if group is None:
        return None, None
    limit_file, usage_file = (
        ("memory.max", "memory.current") if group.version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for directory in group.upwards():
        ceiling = _number(directory / limit_file)
        if ceiling is None or ceiling >= _UNLIMITED:
            continue
        limit = ceiling if limit is None else min(limit, ceiling)
        usage = _number(directory / usage_file) or 0
        # Page cache on the inactive list goes first when the group needs memory, so it counts as available.
        cache = _stat(directory / "memory.stat", "total_inactive_file" if group.version == 1 else "inactive_file")
        left = max(0, ceiling - max(0, usage - cache))
        available = left if available is None else min(available, left)
    return limit, available


def _group_cpu_quota(groups: dict[str, Group]) -> float | None:
    """The tightest CPU quota above us in processors, ``None`` where there is none."""
    group = groups.get("cpu") or groups.get("")
    quota: float | None = None
    for directory in group.upwards() if group else ():
        if group and group.version == 2:
            words = (_text(directory / "cpu.max") or "max").split()
        else:
            words = [(_text(directory / f"cpu.cfs_{name}_us") or "-1").strip() for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            value = int(words[0]) / int(words[1])
            quota = value if quota is None else min(quota, value)
    return quota


def read_memory(root: Path = Path("/")) -> Memory:
    """Memory now. Raises ``host-lacks`` where ``/proc/meminfo`` cannot be read."""
    fields: dict[str, int] = {}
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            fields[name] = int(number[0]) * 1024
    if "MemTotal" not in fields:
        raise MicaError(Code.HOST_LACKS, "/proc/meminfo does not say how much memory there is", hint="mount /proc")
    host = fields["MemTotal"]
    available = fields.get("MemAvailable", fields.get("MemFree", 0) + fields.get("Cached", 0))
    limit, left = _group_memory(own_groups(root))
    if limit is not None and limit >= host:
        limit = None
    return Memory(
        host=Bytes(host),
        total=Bytes(host if limit is None else limit),
        available=Bytes(available if left is None else min(available, left)),
        limit=None if limit is None else Bytes(limit),
        swap_total=Bytes(fields.get("SwapTotal", 0)),
        swap_free=Bytes(fields.get("SwapFree", 0)),
    )


def read_boot_id(root: Path = Path("/")) -> str:
    """A word that changes with each boot (random(4)). Raises ``host-lacks`` where the kernel does not tell."""
    text = (_text(root / "proc/sys/kernel/random/boot_id") or "").strip()
    if not text:
        raise MicaError(Code.HOST_LACKS, "/proc/sys/kernel/random/boot_id cannot be read", hint="mount /proc")
    return text


def _shm(root: Path, mounts: list[_Mount]) -> tuple[int, int]:
    if not any(mount.point == "/dev/shm" and mount.kind == "tmpfs" for mount in mounts):  # noqa: S108 - a name
        return 0, 0
    try:
        stat = os.statvfs(root / "dev/shm")
    except OSError:
        return 0, 0
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def read_facts(root: Path = Path("/")) -> HostFacts:
    """Everything that :class:`HostFacts` has, now. ``root`` is where ``proc`` and ``sys`` lie.

    Raises ``host-lacks`` where ``/proc`` is not there.
    """
    memory = read_memory(root)
    name = os.uname()
    shm_total, shm_free = _shm(root, _mounts(root))
    return HostFacts(
        hostname=name.nodename,
        kernel=name.release,
        architecture=name.machine,
        boot_id=read_boot_id(root),
        memory_host=memory.host,
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=memory.limit,
        swap_total=memory.swap_total,
        swap_free=memory.swap_free,
        cpus=len(os.sched_getaffinity(0)),
        cpu_quota=_group_cpu_quota(own_groups(root)),
        shm_total=Bytes(shm_total),
        shm_free=Bytes(shm_free),
    )
