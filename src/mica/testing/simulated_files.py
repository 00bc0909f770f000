"""Files of a simulated host, as far as disks, memory and snapshots have any.

A file has no bytes but a list of tokens: what a machine has written to it, in order. Through a layer one reads what
lies below first. Like a file on a disk it may have two names, which is what freezing a volume comes to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mica.model.image import DiskFormat
from mica.model.units import Bytes
from mica.ports.volumes import Volume

POOL: Final = Path("/simulated/volumes")
PARTS: Final = Path("/simulated/parts")
SCRATCH: Final = Path("/simulated/scratch")


_NONE: Final = Bytes(0)


@dataclass(frozen=True)
class Moment:
    """What a machine had in memory and on its disks when its state was captured."""

    memory: tuple[str, ...]
    disks: dict[str, tuple[str, ...]]


@dataclass(eq=False)
class SimulatedFile:
    """``below`` are the files that it is a layer over, nearest first. ``damage`` is what a test has done to it.

    ``allocated`` is what it takes of the host's disk, which is free again once it is gone. ``moment`` is known of the
    state of devices, and of nothing else: every machine that begins there must find it as it was.
    """

    tokens: list[str] = field(default_factory=list)
    below: tuple[Path, ...] = ()
    size: Bytes = _NONE
    format: DiskFormat = DiskFormat.RAW
    read_only: bool = False
    damage: str = ""
    allocated: int = 0
    moment: Moment | None = None

    def write(self, token: str) -> None:
        """Raises :class:`AssertionError` when it is a part: no machine may ever write to one."""
        assert not self.read_only, f"{token!r} is written to a file that never changes"
        self.tokens.append(token)


class SimulatedFiles:
    """What lies where. ``staged`` are the volumes that a VM goes on with once they are taken."""

    def __init__(self) -> None:
        self.there: dict[Path, SimulatedFile] = {}
        self.staged: dict[str, dict[str, Volume]] = {}
        self.generations: dict[tuple[str, str], int] = {}

    def read(self, path: Path) -> tuple[str, ...]:
        """What a guest would read, oldest first; images have nothing to read. Raises :class:`KeyError` when a part is
        gone."""
        file = self.there[path]
        below = [self.there[p] for p in reversed(file.below) if p in self.there or p.parent == PARTS]
        return tuple(token for layer in (*below, file) for token in layer.tokens)

    def put(self, path: Path, tokens: Iterable[str]) -> None:
        """A file that somebody has written, over an earlier one."""
        self.there[path] = SimulatedFile(list(tokens))

    def remove(self, path: Path) -> int:
        """Take away a name, and with the last one the file. Returns the bytes that are free now."""
        file = self.there.pop(path, None)
        return 0 if file is None or file in self.there.values() else file.allocated

    @property
    def scratch(self) -> set[str]:
        """Names of directories in which there are files on their way to be parts."""
        return {path.parent.name for path in self.there if path.parent.parent == SCRATCH}

    @property
    def parts(self) -> dict[str, SimulatedFile]:
        return {path.name: file for path, file in self.there.items() if path.parent == PARTS}
