"""What admission needs to know of the host."""

from __future__ import annotations

from typing import Protocol

import msgspec

from mica.model.units import Bytes


class Capacity(msgspec.Struct, frozen=True):
    """One look at the host. ``available`` is what could be used without swapping; ``ram_free`` what the file system
    that holds guest RAM has left (0 of ``ram_total`` 0: guest RAM is not kept in a file system of its own).
    """

    cpus: int
    memory: Bytes
    available: Bytes
    ram_total: Bytes
    ram_free: Bytes
    disk_free: Bytes


class Host(Protocol):
    def capacity(self) -> Capacity: ...

    def boot_id(self) -> str:
        """Another one after every boot of the host."""
