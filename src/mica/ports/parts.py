"""What the engine needs from a place for files that never change (:mod:`mica.model.snapshot`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from mica.model.units import Bytes
from mica.model.vm import DiskSpec
from mica.ports.volumes import Volume


class Seal(msgspec.Struct, frozen=True):
    """What is known of a part that is on disk: bytes it takes there, and the checksum of its content."""

    size: Bytes
    digest: str


class Parts(Protocol):
    """Files by the id of their part. All verbs are idempotent."""

    def path(self, part_id: str) -> Path:
        """Where the file lies, whether it is there or not."""

    async def scratch(self, name: str) -> Path:
        """An empty or earlier directory called ``name`` for files that are on their way to be kept."""

    async def drop_scratch(self, name: str) -> None:
        """Remove it with what is in it."""

    async def keep(self, part_id: str, source: Path) -> None:
        """Take a finished file over, from any file system; ``source`` is gone afterwards, and an earlier file of that
        part with it. On one file system nothing waits for the disk. Raises ``not-found``, ``insufficient-disk``
        before anything is written, ``corrupt`` when ``source`` is no ordinary file."""

    async def need_space(self, size: Bytes) -> None:
        """Raises ``insufficient-disk`` with the numbers when so much more would not fit beside what is left free for
        the host."""

    async def seal(self, part_id: str, report: Callable[[float], None]) -> Seal:
        """Bring the file to disk (fsync), make it read-only and checksum it. ``report`` is told 0.0 to 1.0."""

    async def verify(
        self, part_id: str, digest: str, report: Callable[[float], None], *, rate: Bytes | None = None
    ) -> None:
        """Read no more than ``rate`` bytes in a second. Raises ``corrupt`` when the content differs from ``digest``,
        ``not-found`` when it is gone."""

    async def remove(self, part_id: str) -> None: ...

    async def present(self) -> set[str]:
        """Ids of all parts that have a file, also an unfinished one, for the reaper."""


class Branches(Protocol):
    """How the volumes of a VM become layers, and what it goes on with. All verbs are idempotent.

    ``disk`` may be the UEFI variables: a ``DiskSpec`` named ``nvram``.

        freeze ──► stage ──► take        the VM's file is a part now; the new file over it is the VM's
                        └──► unstage     as it was

    A staged file has its final name: a machine that has it open finds it there before and after ``take``.
    """

    async def disks(self, vm_id: str) -> set[str]:
        """Names of the disks (and ``nvram``) that the VM has files of."""

    async def freeze(self, vm_id: str, disk: DiskSpec, part_id: str) -> None:
        """Give the file that the disk now is a second name, as a part. A machine may be writing to it still.

        Raises ``not-found``, ``corrupt``, ``exists`` when the part is another file, ``host-lacks`` where files cannot
        have two names.
        """

    async def set_aside(self, vm_id: str, disk: str, part_id: str) -> None:
        """As :meth:`freeze`, for a file that may be damaged: nothing of it is read or believed. Raises ``host-lacks``,
        ``exists``. A disk that has no file any more is no error."""

    async def merge(self, part_id: str, below: int) -> Seal:
        """Make a layer that reads as the part does without the ``below`` parts under it, beside it, with its checksum.

        It begins anew each time, gently with the host. Raises ``insufficient-disk`` before anything is written,
        ``corrupt`` when what was made does not read the same.
        """

    async def put_merged(self, part_id: str) -> None:
        """Put what was made in the place of the part's file; machines keep what they have open. Idempotent."""

    async def drop_merged(self, part_id: str) -> None:
        """Remove what was made and is not in place."""

    async def stage(self, vm_id: str, disk: DiskSpec, base: Path, owner: tuple[int, int] | None) -> Volume:
        """Make the file that the disk goes on with, an empty layer over ``base``, beside the present one.

        It is as large as ``base``. ``base`` may be any snapshot's layer, and the disk may be one that the VM has not
        now. What is staged over that base already stays as it is, over another one it is replaced. Raises
        ``insufficient-disk`` before anything is written, ``state-conflict`` when it would have too many layers below.
        """

    async def take(self, vm_id: str) -> None:
        """Put every staged file in the place of the present one, which stays only as what it was frozen as, and then
        is read-only for everybody and readable for all machines that are shown it."""

    async def unstage(self, vm_id: str) -> None:
        """Remove staged files. The parts that were frozen are the caller's to remove."""
