"""The accelerator a machine runs on, and what is chosen for its sake.

Under TCG: ``thread=multi`` uses a host processor for each vCPU; a translation buffer of 64 MiB boots small guests as
quickly as QEMU's default of a quarter of the RAM up to 1 GiB (measured), and is memory that counts; ``Nehalem``
(x86-64-v2) boots faster than ``max``, which emulates extensions that cost more than they bring; a Linux whose command
line is ours to write leaves out what protects it from a processor's speculation: an emulated processor does not
speculate, and page-table isolation empties its TLB at each system call, which then takes four times as long (measured).
"""

from __future__ import annotations

from enum import StrEnum

from mica.model.units import GIB, MIB, Bytes
from mica.model.vm import VmSpec
from mica.qemu.arguments import Arguments, pairs


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


def translation_buffer(spec: VmSpec) -> Bytes:
    """Size of TCG's code buffer: 64 MiB, for guests of 1 GiB and more 128 MiB."""
    return Bytes((128 if spec.memory >= GIB else 64) * MIB)


def cpu_model(accelerator: Accelerator, spec: VmSpec) -> str:
    if spec.cpu_model:
        return spec.cpu_model
    return "host" if accelerator is Accelerator.KVM else "Nehalem"


def kernel_words(accelerator: Accelerator) -> tuple[str, ...]:
    """What goes on the command line of a Linux that is booted directly (kernel-parameters in Linux' documentation)."""
    return ("mitigations=off",) if accelerator is Accelerator.TCG else ()


def arguments(accelerator: Accelerator, spec: VmSpec) -> Arguments:
    if accelerator is Accelerator.TCG:
        return pairs("accel", "tcg", thread="multi", tb_size=translation_buffer(spec) // MIB)
    return pairs("accel", "kvm")
