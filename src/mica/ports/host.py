"""What admission needs to know of the host."""

from __future__ import annotations

from typing import Protocol

import msgspec

from mica.model.units import Bytes


class Capacity(msgspec.Struct, frozen=True):
    """One look at the host. ``available`` is what could be used without swapping."""

    cpus: int
    memory: Bytes
    available: Bytes
    disk_free: Bytes


class Host(Protocol):
    def capacity(self) -> Capacity: ...

    def boot_id(self) -> str:
        """Another one after every boot of the host."""
