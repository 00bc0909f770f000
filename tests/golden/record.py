"""Writes down what the QEMU of this host can do, cut to what the command line asks about.

The golden files must not depend on the host that the tests run on, so they are made for a QEMU that was recorded once:
``python -m tests.golden.record``.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import msgspec

from mica.qemu.discover import Qemu, QemuBuild

RECORDED = Path(__file__).with_name("qemu-7.2.json")

_CPU_MODELS = ("Nehalem", "Skylake-Server", "host", "max", "qemu64")
_DEVICES = ("VGA", "virtio-balloon-pci", "virtio-tablet-pci", "virtio-vga", "vmgenid")
_PROPERTIES = {"virtio-balloon-pci": ("deflate-on-oom", "free-page-reporting")}


def trim(build: QemuBuild) -> QemuBuild:
    """The parts of ``build`` that decide about a command line."""
    return msgspec.structs.replace(
        build,
        path="/usr/bin/qemu-system-x86_64",
        identity="recorded",
        machines=tuple(name for alias, name in build.aliases.items() if alias == "q35"),
        aliases={alias: name for alias, name in build.aliases.items() if alias == "q35"},
        cpu_models=tuple(name for name in _CPU_MODELS if name in build.cpu_models),
        devices=frozenset(name for name in _DEVICES if name in build.devices),
        objects={},
        netdevs={},
        blockdevs={},
        commands={},
        options={"sandbox": build.options["sandbox"]},
        migration_capabilities=frozenset(),
        properties={
            name: tuple(p for p in wanted if p in build.properties[name]) for name, wanted in _PROPERTIES.items()
        },
    )


def recorded() -> QemuBuild:
    return msgspec.json.decode(RECORDED.read_bytes(), type=QemuBuild)


def lacking() -> QemuBuild:
    """A QEMU built without everything that Mica can do without."""
    return msgspec.structs.replace(
        recorded(), path="/opt/qemu/bin/qemu-system-x86_64", devices=frozenset({"VGA"}), options={}, properties={}
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:
        build = asyncio.run(Qemu(path="/usr/bin", cache=Path(cache)).build())
    data = msgspec.json.format(msgspec.json.encode(trim(build), order="deterministic"), indent=2)
    RECORDED.write_bytes(data + b"\n")
    print(f"{RECORDED}: QEMU {build.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
