"""What the doctor's checks are given, and what they give back.

What lies in other rooms (QEMU, the jail, passt) is asked through :class:`Probes`, which the daemon fills.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from mica.host.doctor_fix import Fixes
from mica.host.slices import HostSlices
from mica.model.doctor import AcceleratorProof, Finding, HostFacts
from mica.model.errors import MicaError

CHECK_TIMEOUT_S = 60.0


class QemuView(Protocol):
    """What doctor wants to know of a QEMU build; :class:`mica.qemu.discover.QemuBuild` has it."""

    @property
    def path(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def machines(self) -> Sequence[str]: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...
    @property
    def accelerators(self) -> Sequence[str]: ...
    @property
    def has_sandbox(self) -> bool: ...


class JailView(Protocol):
    """The jail that this host allows; :class:`mica.qemu.jail.Jail` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def proof(self) -> str: ...
    @property
    def reduced(self) -> Sequence[str]: ...


class NetworkView(Protocol):
    """The program behind user-mode networking; :class:`mica.network.passt.Passt` has it."""

    @property
    def path(self) -> str: ...
    @property
    def proof(self) -> str: ...


class ReducedNetworkView(Protocol):
    """Leave to do without that program; :class:`mica.network.slirp.Slirp` has it."""

    @property
    def costs(self) -> str: ...


class FirmwareView(Protocol):
    """UEFI firmware; :class:`mica.qemu.discover_firmware.UefiFirmware` has it."""

    @property
    def code(self) -> str: ...
    @property
    def vars(self) -> str: ...


class Probes(msgspec.Struct, frozen=True, kw_only=True):
    """How the other rooms are asked. Each raises :class:`MicaError` where the host lacks something.

    ``accelerators`` takes whether to run the guests again. ``slices`` are the control groups that this daemon has
    found and uses; where they are not given, the doctor looks for what a daemon could use. ``reduced_network`` is told
    what ``network`` raised, and raises what is to be said of it when nothing may stand in.
    """

    qemu: Callable[[], Awaitable[QemuView]]
    accelerators: Callable[[bool], Awaitable[Sequence[AcceleratorProof]]]
    jail: Callable[[], Awaitable[JailView]]
    network: Callable[[], Awaitable[NetworkView]]
    reduced_network: Callable[[MicaError], Awaitable[ReducedNetworkView]]
    firmware: Callable[[], FirmwareView | None]
    slices: HostSlices | None = None


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """Whom and what is examined: ``home`` is MICA_HOME, ``path`` the search path for programs, ``root`` where ``proc``,
    ``sys`` and ``etc`` lie."""

    home: Path
    path: str
    uid: int
    user: str
    probes: Probes
    root: Path = Path("/")
    fresh: bool = False
    check_timeout_s: float = CHECK_TIMEOUT_S


class Patient(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks get. ``qemu`` is the build or why there is none; ``proofs`` is empty without QEMU."""

    examination: Examination
    facts: HostFacts
    fixes: Fixes
    qemu: QemuView | MicaError
    proofs: tuple[AcceleratorProof, ...]

    @property
    def is_root(self) -> bool:
        return self.examination.uid == 0

    @property
    def root(self) -> Path:
        return self.examination.root

    def program(self, name: str) -> str | None:
        """Where a program lies; the directories of system programs are looked at too."""
        return shutil.which(name, path=f"{self.examination.path}{os.pathsep}/usr/local/sbin:/usr/sbin:/sbin")

    def setting(self, name: str) -> str | None:
        """A kernel setting such as ``kernel.yama.ptrace_scope``; ``None`` where this kernel does not have it."""
        return self.text(f"proc/sys/{name.replace('.', '/')}")

    def text(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None


Check = Callable[[Patient], Awaitable[Sequence[Finding]]]
