"""The commands that close gaps, for the distribution at hand and the user who asks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

_INSTALL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "debian": ("apt-get", "install", "-y"),
        "fedora": ("dnf", "install", "-y"),
        "arch": ("pacman", "-S", "--needed", "--noconfirm"),
        "suse": ("zypper", "--non-interactive", "install"),
    }
)
_FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("debian", "ubuntu"), "debian"),
        **dict.fromkeys(("fedora", "rhel", "centos"), "fedora"),
        "arch": "arch",
        **dict.fromkeys(("suse", "opensuse", "sles"), "suse"),
    }
)
# Package by program; where a family has another name for it, after the family's name.
_PACKAGES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "qemu-system-x86_64": {"": "qemu-system-x86", "suse": "qemu-x86"},
        "qemu-img": {"": "qemu-img", "debian": "qemu-utils"},
        "bwrap": {"": "bubblewrap"},
        "passt": {"": "passt"},
        "setpriv": {"": "util-linux"},
        "prlimit": {"": "util-linux"},
        "unshare": {"": "util-linux"},
        "mmdebstrap": {"": "mmdebstrap"},
        "newuidmap": {"": "shadow", "debian": "uidmap", "fedora": "shadow-utils"},
        "mke2fs": {"": "e2fsprogs"},
        "sfdisk": {"": "util-linux", "debian": "fdisk"},
        "mcopy": {"": "mtools"},
        "apt-get": {"": "apt"},
        "dpkg-deb": {"": "dpkg"},
        "ovmf": {"": "edk2-ovmf", "debian": "ovmf", "suse": "qemu-ovmf-x86_64"},
    }
)


class Fixes(msgspec.Struct, frozen=True):
    """``family`` is how the distribution installs packages, empty when that is not known; ``root``: we are root."""

    family: str
    root: bool

    def command(self, *argv: str) -> tuple[str, ...]:
        """As root, ``argv`` itself; else through sudo."""
        return argv if self.root else ("sudo", *argv)

    def package(self, program: str) -> str:
        names = _PACKAGES.get(program, {})
        return names.get(self.family) or names.get("") or program

    def install(self, programs: Iterable[str]) -> tuple[str, ...]:
        """The command that installs what has these programs; empty on a distribution that is not known."""
        packages = sorted({self.package(program) for program in programs})
        verb = _INSTALL.get(self.family)
        return self.command(*verb, *packages) if verb and packages else ()

    def sysctl(self, name: str, value: int) -> tuple[str, ...]:
        """Set a kernel setting now and at each boot."""
        file = f"/etc/sysctl.d/60-mica-{name.rpartition('.')[2]}.conf"
        line = shlex.quote(f"{name} = {value}")
        return self.command("sh", "-c", f"echo {line} > {file} && sysctl -p {file}")

    def allow_namespaces(self, program: str) -> tuple[str, ...]:
        """Let one program make user namespaces where AppArmor forbids them to others (apparmor.d(5), "userns").

        The name begins with ours, so that it meets no profile of the distribution's.
        """
        name = f"mica-{program.rpartition('/')[2]}"
        profile = (
            "abi <abi/4.0>,",
            "include <tunables/global>",
            f"profile {name} {program} flags=(unconfined) {{ userns, }}",
        )
        file = f"/etc/apparmor.d/{name}"
        return self.command("sh", "-c", f"printf '%s\\n' {shlex.join(profile)} > {file} && apparmor_parser -r {file}")


def read_family(root: Path = Path("/")) -> str:
    """``debian``, ``fedora``, ``arch``, ``suse`` or nothing, from os-release(5)."""
    fields: dict[str, str] = {}
    for name in ("etc/os-release", "usr/lib/os-release"):
        try:
            text = (root / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            key, _, value = line.partition("=")
            fields.setdefault(key.strip(), value.strip().strip("\"'"))
        break
    for word in (fields.get("ID", ""), *fields.get("ID_LIKE", "").split()):
        for known, family in _FAMILIES.items():
            if word == known or word.startswith(f"{known}-"):
                return family
    return ""
