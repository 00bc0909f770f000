"""User-mode networking, and the device for taps."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from mica.host.doctor_base import Patient
from mica.model.doctor import Finding, Status
from mica.model.errors import MicaError

# linux/if_tun.h: TUNSETIFF with IFF_TAP | IFF_NO_PI. The interface is gone when the descriptor is closed.
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_TRIAL_NAME = b"micadoctor%d"


async def user_mode(patient: Patient) -> Sequence[Finding]:
    title = "User-mode network"
    try:
        found = await patient.examination.probes.network()
    except MicaError as error:
        return [await _without_passt(patient, title, error)]
    return [Finding(id="network", title=title, status=Status.OK, proof=f"{found.path} was run: {found.proof}")]


async def _without_passt(patient: Patient, title: str, lack: MicaError) -> Finding:
    missing = patient.program("passt") is None
    try:
        costs, note = (await patient.examination.probes.reduced_network(lack)).costs, lack.hint
    except MicaError as error:
        costs, note = "a VM with a NIC is refused; one without (--network none) runs", error.hint
    return Finding(
        id="network",
        title=title,
        status=Status.DEGRADED,
        proof=lack.message,
        costs=costs,
        fix=patient.fixes.install(["passt"]) if missing else (),
        fix_note="" if missing else note,
    )


async def taps(patient: Patient) -> Sequence[Finding]:
    """Whether network interfaces for VMs can be made, by making one."""
    title = "Taps"
    device = patient.root / "dev/net/tun"
    failure = _make_tap(device)
    if not failure:
        return [Finding(id="tun", title=title, status=Status.OK, proof=f"a tap was made through {device} and removed")]
    absent = not device.exists()
    return [
        Finding(
            id="tun",
            title=title,
            status=Status.DEGRADED,
            proof=f"no tap can be made through {device}: {failure}",
            costs="no managed networks, on which VMs reach each other; user-mode networking needs no tap",
            fix=patient.fixes.command("modprobe", "tun") if absent else (),
            fix_note="" if absent else "a daemon that runs as root may make taps",
        )
    ]


def _make_tap(device: Path) -> str:
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        request = struct.pack("16sH22x", _TRIAL_NAME, _IFF_TAP | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(descriptor)
    return ""
