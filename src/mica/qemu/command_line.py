"""From a launch plan to QEMU's argument vector. Pure: the same plan on the same host gives the same vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.image import Firmware
from mica.model.vm import Machine, Vm
from mica.ports.hypervisor import LaunchPlan
from mica.qemu import accel
from mica.qemu.accel import Accelerator
from mica.qemu.arguments import Arguments, Bus, concat, flag, pairs
from mica.qemu.devices import agent, balloon, disk, display, firmware, machine, nic, rng, serial
from mica.qemu.discover import QemuBuild

NVRAM = "nvram"


class Sockets(msgspec.Struct, frozen=True):
    """Where one VM's sockets lie; short, because a UNIX socket's path ends at 108 bytes (unix(7))."""

    directory: Path

    @property
    def control(self) -> Path:
        return self.directory / "qmp"

    @property
    def rescue(self) -> Path:
        return self.directory / "rescue"

    @property
    def agent(self) -> Path:
        return self.directory / "agent"

    @property
    def serial(self) -> Path:
        return self.directory / "serial"


class QemuHost(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line needs to know of the host: which QEMU, which accelerator, which UEFI firmware.

    ``direct_io`` tells whether a file can be opened around the page cache.
    """

    build: QemuBuild
    accelerator: Accelerator
    firmware_code: Path | None = None
    firmware_format: str = "raw"
    direct_io: Callable[[Path], bool]


def boot_index(plan: LaunchPlan, name: str) -> int | None:
    """Position in the boot order, from 0. Without an order the first disk comes first.

    A kernel that QEMU loads itself has the first place (QEMU, ``hw/i386/x86.c``: linuxboot is given index 0), and no
    second is ever tried.
    """
    if plan.direct_boot is not None:
        return None
    spec = plan.vm.spec
    order = spec.boot or tuple(d.name for d in spec.disks[:1])
    return order.index(name) if name in order else None


def _identity(vm: Vm) -> Arguments:
    # cloud-init's NoCloud reads instance and host name from the serial number (its documentation, "NoCloud").
    seed = f"ds=nocloud;i={vm.id};h={vm.spec.hostname or vm.name}"
    return concat(
        [
            pairs("name", "", guest=vm.name, debug_threads=True),
            flag("uuid", vm.id),
            pairs("smbios", "", type=1, manufacturer="Mica", product="Virtual Machine", serial=seed, uuid=vm.id),
        ]
    )


def _boot(plan: LaunchPlan, accelerator: Accelerator) -> Arguments:
    if plan.direct_boot is None:
        return Arguments()
    assert plan.kernel is not None
    assert plan.initrd is not None
    name = plan.vm.spec.hostname or plan.vm.name
    words = [plan.direct_boot.cmdline, *accel.kernel_words(accelerator), f"mica.hostname={name}"]
    append = flag("append", " ".join(words))
    return concat([flag("kernel", str(plan.kernel)), flag("initrd", str(plan.initrd)), append])


def _devices(plan: LaunchPlan, host: QemuHost, sockets: Sockets) -> Arguments:
    spec, build, bus = plan.vm.spec, host.build, Bus()
    volumes = {v.name: v for v in plan.volumes}
    attached = {n.name: n for n in plan.nics}
    parts = [agent.arguments(sockets.agent, bus)] if spec.agent else []
    parts.append(rng.arguments(bus))
    reporting = build.has_property("virtio-balloon-pci", "free-page-reporting")
    parts.append(balloon.arguments(bus, free_page_reporting=reporting))
    if spec.display and spec.machine is not Machine.MINIMAL:
        vga = build.has_device("virtio-vga")
        parts.append(display.arguments(bus, virtio_vga=vga, tablet=build.has_device("virtio-tablet-pci")))
    for d in spec.disks:
        index = boot_index(plan, d.name)
        parts.append(disk.arguments(d, volumes[d.name], bus, bootindex=index, direct_io=host.direct_io))
    for hub, n in enumerate(spec.nics):
        index = boot_index(plan, n.name)
        parts.append(nic.arguments(n, attached[n.name], bus, hub=hub, bootindex=index, apart=plan.origin is not None))
    parts += nic.past(plan.origin.inside if plan.origin else 0)
    return concat(parts)


def build_arguments(plan: LaunchPlan, host: QemuHost, sockets: Sockets, ram: Path, console_log: Path) -> list[str]:
    """The whole vector, ``argv[0]`` included. Raises ``host-lacks`` without UEFI firmware for a UEFI machine."""
    spec = plan.vm.spec
    variables = next((v for v in plan.volumes if v.name == NVRAM), None)
    flash = Arguments()
    if spec.firmware is Firmware.UEFI:
        if host.firmware_code is None or variables is None:
            raise MicaError(Code.HOST_LACKS, "this host has no UEFI firmware", hint="apt-get install -y ovmf")
        flash = firmware.arguments(host.firmware_code, host.firmware_format, variables)
    uefi = spec.firmware is Firmware.UEFI
    parts = [
        flag("no-user-config"),
        flag("nodefaults"),
        # Filters of QEMU's own: no new privileges, no program started, no scheduling changed (-sandbox).
        pairs("sandbox", "on", obsolete="deny", elevateprivileges="deny", spawn="deny", resourcecontrol="deny")
        if host.build.has_sandbox
        else Arguments(),
        _identity(plan.vm),
        accel.arguments(host.accelerator, spec),
        flash,
        machine.board(
            spec,
            host.build.machine("q35"),
            code_node=firmware.CODE if uefi else None,
            vars_node=firmware.VARS if uefi else None,
            vmgenid=(plan.generation_id or plan.vm.id) if host.build.has_device("vmgenid") else "",
        ),
        machine.processors(spec, host.accelerator),
        machine.memory(spec, ram, share=plan.origin is None),
        pairs("rtc", "", base="utc", driftfix="slew"),
        pairs("msg", "", timestamp=True),
        display.headless(),
        # The first monitor is the daemon's; a monitor takes one client, so a second one is kept for rescue.
        *(
            pairs("chardev", "socket", id=name, path=str(path), server=True, wait=False)
            + pairs("mon", "", chardev=name, mode="control")
            for name, path in (("qmp0", sockets.control), ("qmp1", sockets.rescue))
        ),
        serial.arguments(sockets.serial, console_log),
        _boot(plan, host.accelerator),
        _devices(plan, host, sockets),
        # Held until the engine lets it run.
        flag("S"),
        flag("incoming", "defer") if plan.origin else Arguments(),
    ]
    return [host.build.path, *concat(parts).argv()]
