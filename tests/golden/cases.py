"""The machines whose command lines are kept: one for each thing that a spec can ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mica.model.image import DirectBoot, DiskFormat, Firmware
from mica.model.snapshot import MachineBuild
from mica.model.units import GIB, MIB, Bytes
from mica.model.vm import (
    MAX_DISKS,
    MAX_NICS,
    DiskSpec,
    IoLimits,
    Machine,
    NetworkKind,
    NicRuntime,
    NicSpec,
    Publish,
    Vm,
    VmSpec,
    check_spec,
)
from mica.network import addresses, slirp
from mica.ports.hypervisor import LaunchPlan, Origin
from mica.ports.volumes import Volume
from mica.qemu.accel import Accelerator
from mica.qemu.command_line import QemuHost, Sockets, build_arguments
from mica.qemu.discover import QemuBuild

VM_ID = "6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
IMAGE = "blake3:" + "ab" * 32


class Place(msgspec.Struct, frozen=True):
    """Where the files of a machine lie."""

    home: Path = Path("/var/lib/mica")
    runtime: Path = Path("/run/mica/0a1b2c3d")
    ram: Path = Path("/proc/self/fd/9")
    firmware: Path = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")

    @property
    def image(self) -> Path:
        return self.home / "images" / "ab" / ("ab" * 32)

    @property
    def volumes(self) -> Path:
        return self.home / "volumes" / VM_ID

    @property
    def console(self) -> Path:
        return self.home / "logs" / VM_ID / "console.log"

    @property
    def sockets(self) -> Sockets:
        return Sockets(self.runtime / "vm" / VM_ID / "run")

    def link(self, nic: str) -> Path:
        return self.runtime / "net" / VM_ID / nic / "link" / "socket"


def _disk(
    name: str, *, image: bool = False, raw: bool = False, read_only: bool = False, limited: bool = False
) -> DiskSpec:
    return DiskSpec(
        name=name,
        size=Bytes(4 * GIB if image else GIB),
        image=IMAGE if image else None,
        format=DiskFormat.RAW if raw else DiskFormat.QCOW2,
        read_only=read_only,
        limits=IoLimits(500, Bytes(20 * MIB)) if limited else IoLimits(),
    )


def _nic(name: str, last: int, *, network: str = NetworkKind.USER) -> NicSpec:
    publish = (Publish(guest_port=80, host_port=8080),) if network == NetworkKind.USER and last == 1 else ()
    return NicSpec(name=name, network=network, mac=f"52:54:00:00:00:{last:02x}", publish=publish)


NET0, NET1 = _nic("net0", 1), _nic("net1", 2)
ROOT = _disk("root", image=True)

# Machines of that host name begin at the state of another one.
FORK = "fork"

MICRO = VmSpec(memory=Bytes(256 * MIB), image=IMAGE, nics=(NET0,), hostname="web")
DEBIAN = VmSpec(
    cpus=2, memory=Bytes(2 * GIB), firmware=Firmware.UEFI, image=IMAGE, disks=(ROOT,), nics=(NET0,), hostname="web"
)

ORIGIN = Origin(
    ram="ram",
    ram_file=Path("/nowhere/ram"),
    devices=Path("/nowhere/devices"),
    build=MachineBuild(qemu="", machine="", cpu="", accelerator=""),
    inside=1,
)

SPECS: dict[str, VmSpec] = {
    "micro": MICRO,
    "micro-minimal": msgspec.structs.replace(MICRO, machine=Machine.MINIMAL, display=False),
    "micro-headless": msgspec.structs.replace(MICRO, display=False),
    "micro-without-agent": msgspec.structs.replace(MICRO, agent=False, hostname=""),
    "micro-without-network": msgspec.structs.replace(MICRO, nics=(_nic("net0", 1, network=NetworkKind.NONE),)),
    "micro-without-passt": msgspec.structs.replace(MICRO, nics=(_nic("slirp0", 1), _nic("slirp1", 2))),
    "micro-with-data": msgspec.structs.replace(MICRO, disks=(_disk("data"), _disk("fast", raw=True))),
    "debian": DEBIAN,
    "debian-limited": msgspec.structs.replace(
        DEBIAN, disks=(_disk("root", image=True, limited=True), _disk("data", limited=True)), cpu_limit=0.5
    ),
    "debian-bios": msgspec.structs.replace(DEBIAN, firmware=Firmware.BIOS),
    "debian-read-only-disk": msgspec.structs.replace(DEBIAN, disks=(ROOT, _disk("seed", raw=True, read_only=True))),
    "debian-boot-order": msgspec.structs.replace(
        DEBIAN, disks=(ROOT, _disk("other")), nics=(NET0, NET1), boot=("other", "net1", "root")
    ),
    "empty-uefi": VmSpec(firmware=Firmware.UEFI, disks=(_disk("root"),), nics=(NET0,), hostname="web"),
    "nothing": VmSpec(nics=(), hostname="web"),
    "large": VmSpec(
        cpus=16, memory=Bytes(64 * GIB), cpu_model="Skylake-Server", disks=(_disk("root", raw=True),), nics=(NET0, NET1)
    ),
    "long-names": msgspec.structs.replace(
        MICRO,
        disks=(_disk("d" * 62 + "1"), _disk("d" * 62 + "2")),
        nics=(_nic("n" * 63, 1, network=NetworkKind.NONE),),
        hostname="h" * 63,
    ),
    "full": VmSpec(
        disks=tuple(_disk(f"d{n}") for n in range(MAX_DISKS)),
        nics=tuple(_nic(f"net{n}", n + 1) for n in range(MAX_NICS)),
    ),
    FORK: msgspec.structs.replace(DEBIAN, hostname=FORK),
    "odd-paths": msgspec.structs.replace(DEBIAN, disks=(ROOT, _disk("data"))),
}

ODD = Place(
    home=Path("/home/a b,c=d/mica"),
    runtime=Path("/run/user/1000/mi,ca"),
    firmware=Path("/opt/fw, old/CODE.fd"),
)


def place_of(name: str) -> Place:
    return ODD if name == "odd-paths" else Place()


def volumes_of(spec: VmSpec, place: Place) -> tuple[Volume, ...]:
    out = [
        Volume(
            name=disk.name,
            path=place.volumes / f"{disk.name}.{disk.format}",
            format=disk.format,
            size=disk.size,
            backing=(place.image / "disk.qcow2",) if disk.image else (),
            read_only=disk.read_only,
        )
        for disk in spec.disks
    ]
    if spec.firmware is Firmware.UEFI:
        nvram = place.volumes / "nvram.qcow2"
        out.append(Volume(name="nvram", path=nvram, format=DiskFormat.QCOW2, size=Bytes(540672)))
    return tuple(out)


def plan_of(spec: VmSpec, place: Place) -> LaunchPlan:
    check_spec(spec)
    direct = (
        DirectBoot("vmlinuz", "initrd", "console=ttyS0 quiet panic=-1") if spec.image and not _from_disk(spec) else None
    )
    nics = tuple(
        NicRuntime(
            name=nic.name,
            handle=_handle(nic, place),
        )
        for nic in spec.nics
    )
    return LaunchPlan(
        vm=Vm(id=VM_ID, name="web", spec=spec, slot=7, created_at=0.0, created_by="lab"),
        volumes=volumes_of(spec, place),
        nics=nics,
        slice={},
        direct_boot=direct,
        kernel=place.image / "vmlinuz" if direct else None,
        initrd=place.image / "initrd" if direct else None,
        origin=ORIGIN if spec.hostname == FORK else None,
    )


def _handle(nic: NicSpec, place: Place) -> dict[str, Any]:
    if nic.network == NetworkKind.NONE:
        return {"kind": "none"}
    if nic.name.startswith("slirp"):
        given = addresses.nic_addresses(addresses.choose_pool([]), 7, int(nic.name[-1]))
        return slirp.handle(given, nic.publish, ipv6=bool(nic.publish))
    return {"kind": "stream", "socket": str(place.link(nic.name))}


def _from_disk(spec: VmSpec) -> bool:
    return any(disk.image for disk in spec.disks)


def arguments_of(spec: VmSpec, place: Place, build: QemuBuild, accelerator: Accelerator) -> list[str]:
    """The vector on a host where every file can be opened around the page cache."""
    host = QemuHost(
        build=build,
        accelerator=accelerator,
        firmware_code=place.firmware,
        firmware_format="raw",
        direct_io=lambda _: True,
    )
    return build_arguments(plan_of(spec, place), host, place.sockets, place.ram, place.console)


def lines_of(argv: list[str]) -> str:
    """One option with its value a line, the program first."""
    lines = [argv[0]]
    for word in argv[1:]:
        if word.startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"
