"""What the engine needs to handle frozen guest RAM: images that machines map privately and never write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mica.model.units import Bytes
from mica.model.vm import VmRuntime


class RamImages(Protocol):
    """RAM images that are in memory now, by part id. They live as long as a machine maps them or they are held here."""

    async def hold(self, runtime: VmRuntime, ram_id: str) -> None:
        """The RAM that this machine owns is a RAM image from now on: what it writes itself until it ends still counts,
        no one else can ever write or shrink it. Idempotent. Raises ``qemu-failed`` when the machine is gone."""

    def learn(self, runtime: VmRuntime) -> None:
        """A machine may map an image that nothing here holds, for a daemon before this one made it: hold it again."""

    async def prepare(self, runtime: VmRuntime, ram_id: str, report: Callable[[float], None]) -> None:
        """Make what will be a RAM image: a copy of the memory of a machine that maps an image privately, while it runs.
        It is nothing but what a machine can be launched on, to wait, until it is filled. Idempotent, and anew after
        whoever made it died. Raises ``qemu-failed`` when the machine is gone, ``insufficient-memory``."""

    async def fill(self, runtime: VmRuntime, waiting: VmRuntime) -> None:
        """What ``waiting`` was launched on becomes the memory of ``runtime``, which is paused, and a RAM image, held
        as ``waiting.ram``. Idempotent. Raises ``qemu-failed`` when one of them is gone."""

    def discard(self, ram_id: str) -> None:
        """Let go of what was prepared and is no RAM image yet."""

    async def save(self, ram_id: str, file: Path, report: Callable[[float], None]) -> None:
        """Write it to ``file``, holes left out. Raises ``not-found`` when nothing holds it, ``insufficient-disk``."""

    def held(self) -> list[str]:
        """What is held here, the one that a machine was started on last at the end."""

    def size(self, ram_id: str) -> Bytes:
        """What the image takes in memory, holes left out; 0 when it is not held here."""

    def release(self, ram_id: str) -> None:
        """Let go of it; machines that map it keep it."""
