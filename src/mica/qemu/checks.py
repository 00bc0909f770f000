"""Which machines this QEMU could never run. Pure: said when a machine is made, not when it is started."""

from __future__ import annotations

from ipaddress import ip_address

from mica.model.errors import Code, MicaError, invalid
from mica.model.image import Firmware
from mica.model.vm import NetworkKind, VmSpec
from mica.qemu.accel import Accelerator
from mica.qemu.command_line import QemuHost


def check_nics(spec: VmSpec) -> None:
    """Raises ``invalid`` for a NIC that no host could attach."""
    for nic in spec.nics:
        if nic.network not in [kind.value for kind in NetworkKind]:
            kinds = ", ".join(NetworkKind)
            raise invalid(f"NIC {nic.name} asks for network {nic.network!r}", hint=f"there are: {kinds}")
        for publish in nic.publish:
            try:
                ip_address(publish.host_address)
            except ValueError as error:
                raise invalid(
                    f"cannot publish port {publish.guest_port} on {publish.host_address!r}, which is no IP address",
                    hint="127.0.0.1 is this host alone, 0.0.0.0 all its addresses",
                ) from error


def check_host(spec: VmSpec, host: QemuHost) -> None:
    """Raises ``invalid`` and ``host-lacks`` for what this host's QEMU, accelerator and firmware do not have."""
    build = host.build
    if spec.cpu_model and spec.cpu_model not in {*build.cpu_models, "host", "max"}:
        near = sorted(m for m in build.cpu_models if m.lower().startswith(spec.cpu_model[:3].lower()))
        raise MicaError(
            Code.INVALID,
            f"this QEMU ({build.version}) has no CPU model {spec.cpu_model!r}",
            hint=f"similar: {', '.join(near[:8])}" if near else f"it has {len(build.cpu_models)}, such as Nehalem",
        )
    if spec.cpu_model == "host" and host.accelerator is Accelerator.TCG:
        raise MicaError(
            Code.INVALID, "CPU model 'host' needs KVM, which is not proven to work here", hint="see `mica doctor`"
        )
    if spec.firmware is Firmware.UEFI and host.firmware_code is None:
        raise MicaError(
            Code.HOST_LACKS,
            "this host has no UEFI firmware",
            hint="apt-get install -y ovmf, or `mica doctor --fix`",
        )
