"""This host as admission sees it, and its clock."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from mica.host.facts import read_boot_id, read_facts
from mica.model.units import Bytes
from mica.ports.host import Capacity


class SystemClock:
    """The host's own time."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class LocalHost:
    """Implements :class:`mica.ports.host.Host`. ``home`` holds everything that is on disk."""

    def __init__(self, *, home: Path) -> None:
        self._home = home

    def capacity(self) -> Capacity:
        facts = read_facts()
        disk = os.statvfs(_existing(self._home))
        return Capacity(
            cpus=max(1, int(facts.processors)),
            memory=facts.memory_total,
            available=facts.memory_available,
            disk_free=Bytes(disk.f_bavail * disk.f_frsize),
        )

    def boot_id(self) -> str:
        return read_boot_id()


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there already."""
    while not path.exists():
        path = path.parent
    return path
