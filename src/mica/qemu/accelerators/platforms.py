"""Which accelerators there are to prove, by system.

Hypervisor.framework (``hvf``) and the Windows Hypervisor Platform (``whpx``) would be proven like KVM, by the same
canary run through their own interface. They have no prover yet, so they are not in the table and are never used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec

from mica.qemu.accelerators.kvm import KvmProver
from mica.qemu.accelerators.prover import Prover
from mica.qemu.accelerators.tcg import TcgProver
from mica.qemu.discover import QemuBuild


class ProverContext(msgspec.Struct, frozen=True):
    """What provers are built from: the QEMU that will use the accelerator, and who will run it."""

    build: QemuBuild
    uid: int
    user: str


Factory = Callable[[ProverContext], Prover]


def _kvm(context: ProverContext) -> Prover:
    return KvmProver(in_qemu="kvm" in context.build.accelerators, uid=context.uid, user=context.user)


def _tcg(context: ProverContext) -> Prover:
    return TcgProver(context.build)


PROVERS: Mapping[str, tuple[Factory, ...]] = MappingProxyType(
    {
        "linux": (_kvm, _tcg),
        "darwin": (_tcg,),
        "win32": (_tcg,),
    }
)
"""``sys.platform`` → provers, best first. Software emulation runs wherever QEMU does."""


def provers(platform: str, context: ProverContext) -> tuple[Prover, ...]:
    return tuple(make(context) for make in PROVERS.get(platform, (_tcg,)))
