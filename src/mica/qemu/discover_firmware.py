"""Find UEFI firmware (OVMF) for x86_64 on this host.

Distributions describe their firmware in JSON files (QEMU's ``docs/interop/firmware.json``): those are believed first,
in the order that the document asks for. Where there are none, the places that distributions use are looked at.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat

HINT = (
    "install OVMF: apt-get install -y ovmf (Debian, Ubuntu), dnf install -y edk2-ovmf (Fedora, RHEL), "
    "pacman -S edk2-ovmf (Arch)"
)

# Highest precedence last: a file in a later directory replaces the one of the same name in an earlier one.
_DESCRIPTORS = ("usr/share/qemu/firmware", "etc/qemu/firmware")

# (code, template of the variables): 4 MiB variants first, which Debian 13 and Ubuntu 24.04 have alone.
_PLACES = (
    ("usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"),
    ("usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    ("usr/share/qemu/ovmf-x86_64-code.bin", "usr/share/qemu/ovmf-x86_64-vars.bin"),
)


class UefiFirmware(msgspec.Struct, frozen=True, kw_only=True):
    """The two halves of a firmware in flash: the code is read-only and shared, each VM owns a copy of ``vars``.

    Both have the format ``format``. ``secure_boot`` firmware checks signatures and needs SMM.
    """

    code: str
    vars: str
    format: DiskFormat = DiskFormat.RAW
    secure_boot: bool = False
    described_by: str = ""


class _Flash(msgspec.Struct):
    filename: str
    format: str = "raw"


class _Mapping(msgspec.Struct):
    device: str
    executable: _Flash | None = None
    nvram_template: _Flash | None = msgspec.field(name="nvram-template", default=None)
    mode: str = "split"


class _Target(msgspec.Struct):
    architecture: str
    machines: list[str]


class _Descriptor(msgspec.Struct):
    mapping: dict[str, Any]
    targets: list[_Target]
    features: list[str]
    interface_types: list[str] = msgspec.field(name="interface-types", default_factory=list)


def _under(root: Path, filename: str) -> Path:
    return root / filename.lstrip("/")


def _described(root: Path, file: Path, machine: str) -> UefiFirmware | None:
    """The firmware that ``file`` describes, if it is one for ``machine`` and its files are there."""
    try:
        descriptor = msgspec.json.decode(file.read_bytes(), type=_Descriptor)
        if "uefi" not in descriptor.interface_types or descriptor.mapping.get("device") != "flash":
            return None
        mapping = msgspec.convert(descriptor.mapping, type=_Mapping)
    except (OSError, msgspec.MsgspecError):
        return None  # an empty file masks the one below it, by the specification; a broken one describes nothing
    fits = any(
        target.architecture == "x86_64" and any(fnmatchcase(machine, pattern) for pattern in target.machines)
        for target in descriptor.targets
    )
    code, template = mapping.executable, mapping.nvram_template
    if not fits or mapping.mode != "split" or code is None or template is None:
        return None
    if code.format != template.format or code.format not in ("raw", "qcow2"):
        return None
    if not (_under(root, code.filename).is_file() and _under(root, template.filename).is_file()):
        return None
    return UefiFirmware(
        code=code.filename,
        vars=template.filename,
        format=DiskFormat(code.format),
        secure_boot="secure-boot" in descriptor.features or "requires-smm" in descriptor.features,
        described_by=str(file),
    )


def find_uefi(machine: str = "pc-q35-9.0", *, root: Path = Path("/")) -> tuple[UefiFirmware, ...]:
    """Every usable firmware for machine type ``machine`` (its full name), best first; empty where there is none.

    Firmware without Secure Boot comes first: it starts any operating system and needs no SMM.
    """
    files: dict[str, Path] = {}
    for directory in _DESCRIPTORS:
        files.update({file.name: file for file in (root / directory).glob("*.json")})
    found = [firmware for name in sorted(files) if (firmware := _described(root, files[name], machine))]
    known = {firmware.code for firmware in found}
    for code, template in _PLACES:
        if f"/{code}" not in known and (root / code).is_file() and (root / template).is_file():
            found.append(UefiFirmware(code=f"/{code}", vars=f"/{template}"))
    return tuple(sorted(found, key=lambda firmware: firmware.secure_boot))


def best_uefi(machine: str = "pc-q35-9.0", *, root: Path = Path("/")) -> UefiFirmware | None:
    """The best firmware without Secure Boot; ``None`` where there is none."""
    return next((firmware for firmware in find_uefi(machine, root=root) if not firmware.secure_boot), None)


def require_uefi(machine: str = "pc-q35-9.0", *, root: Path = Path("/")) -> UefiFirmware:
    """The best firmware. Raises ``host-lacks`` where there is none without Secure Boot."""
    firmware = best_uefi(machine, root=root)
    if firmware is not None:
        return firmware
    raise MicaError(Code.HOST_LACKS, "there is no UEFI firmware (OVMF) for x86_64 on this host", hint=HINT)
