"""What a machine is given before it starts: its directory, its logs, and what its jail shows it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mica.host.processes import ResourceLimits
from mica.model.errors import Code, MicaError
from mica.model.image import Firmware
from mica.model.units import MIB, Bytes
from mica.ports.hypervisor import LaunchPlan
from mica.qemu.devices.nic import needs_host_network
from mica.qemu.jail import JailSpec, JailUser


def make_run_dir(directory: Path) -> Path:
    """The directory of one incarnation, and in it the one for the machine's own user, which is returned."""
    (directory / "run").mkdir(parents=True, mode=0o711)
    directory.parent.chmod(0o711)
    directory.chmod(0o711)
    return directory / "run"


def make_logs(directory: Path) -> tuple[Path, Path]:
    """The files of the serial port and of QEMU's messages, made unless they are there. Raises ``corrupt``."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o711)
    for name in ("console.log", "qemu.log"):
        file = directory / name
        descriptor = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise MicaError(Code.CORRUPT, f"{file} is not a file")
        os.close(descriptor)
    return directory / "console.log", directory / "qemu.log"


def jail_spec(
    plan: LaunchPlan,
    *,
    writable: tuple[Path, ...],
    logs: tuple[Path, ...],
    log_room: Bytes,
    firmware_code: Path | None,
    devices: tuple[Path, ...],
    user: JailUser | None,
    raisable: bool,
) -> JailSpec:
    """``writable`` besides its disks; ``log_room`` is how much longer each of ``logs`` may become at once, in bytes."""
    lengths = [file.stat().st_size + log_room for file in logs]
    largest = max([*lengths, *(Bytes(int(v.size * 1.1) + 64 * MIB) for v in plan.volumes)])
    return JailSpec(
        writable=(*writable, *(v.path for v in plan.volumes if not v.read_only)),
        readable=_readable(plan, firmware_code),
        devices=devices,
        user=user,
        host_network=any(map(needs_host_network, plan.nics)),
        limits=ResourceLimits(file_size=largest, core=0, raisable=raisable),
    )


def _readable(plan: LaunchPlan, firmware_code: Path | None) -> tuple[Path, ...]:
    """What the machine's process may read and not write, beyond the system's programs."""
    paths = [*(b for v in plan.volumes for b in v.backing), *(v.path for v in plan.volumes if v.read_only)]
    paths += [p for p in (plan.kernel, plan.initrd) if p is not None]
    # The directory and not the socket itself, so that a network process that was replaced is seen.
    paths += [Path(n.handle["socket"]).parent for n in plan.nics if "socket" in n.handle]
    if any(map(needs_host_network, plan.nics)):  # then QEMU itself asks the host's resolvers for the guest
        paths += [p for p in (Path("/etc/resolv.conf"),) if p.exists()]
    if plan.vm.spec.firmware is Firmware.UEFI and firmware_code is not None:
        paths.append(firmware_code)
    return tuple(dict.fromkeys(p for p in paths if not p.is_relative_to("/usr")))
