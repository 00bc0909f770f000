"""The board, its memory and its processors.

Guest RAM is always a file mapping: forks, migration and shared folders build on it (QEMU docs,
``memory-backend-file``).
"""

from __future__ import annotations

from pathlib import Path

from mica.model.vm import Machine, VmSpec
from mica.qemu.accel import Accelerator, cpu_model
from mica.qemu.arguments import Arguments, concat, flag, from_json, mebibytes, pairs


def board(spec: VmSpec, machine_type: str, *, code_node: str | None, vars_node: str | None, vmgenid: str) -> Arguments:
    """``machine_type`` is a versioned name, so that an upgraded QEMU keeps the machine as it was (live migration).

    ``vmgenid`` is the generation's UUID, empty where this QEMU has no such device.
    """
    minimal = spec.machine is Machine.MINIMAL
    return pairs(
        "machine",
        machine_type,
        memory_backend="ram",
        # Paravirtual parts of other hypervisors, and timers that a guest with a TSC has no use for.
        vmport=False,
        hpet=False,
        sata=False if minimal else None,
        smbus=False if minimal else None,
        pflash0=code_node,
        pflash1=vars_node,
        # A device state without its description is a third smaller, and snapshots are many.
        suppress_vmdesc=True,
    ) + (from_json("device", {"driver": "vmgenid", "id": "vmgenid", "guid": vmgenid}) if vmgenid else Arguments())


def memory(spec: VmSpec, file: Path, *, share: bool) -> Arguments:
    """RAM is ``file``: shared, or (``share`` false) a private copy of a RAM image, copied by page as it is written."""
    backend = {"qom-type": "memory-backend-file", "id": "ram", "size": spec.memory, "mem-path": str(file)}
    return concat(
        [
            from_json("object", {**backend, "share": share, "prealloc": False}),
            pairs("m", "", size=f"{mebibytes(spec.memory)}M"),
        ]
    )


def processors(spec: VmSpec, accelerator: Accelerator) -> Arguments:
    return flag("cpu", cpu_model(accelerator, spec)) + pairs("smp", "", cpus=spec.cpus, sockets=1, cores=spec.cpus)
