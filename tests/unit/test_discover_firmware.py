"""UEFI firmware, found on hosts laid out as distributions lay theirs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.model.errors import MicaError
from mica.model.image import DiskFormat
from mica.qemu.discover_firmware import find_uefi, require_uefi


class FakeRoot:
    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str, text: bytes = b"flash") -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)

    def descriptor(
        self, path: str, code: str, template: str, *, fmt: str = "raw", types: str = "uefi", **changes: Any
    ) -> None:
        for file in (code, template):
            self.file(file)
        content = {
            "interface-types": [types],
            "mapping": {
                "device": "flash",
                "executable": {"filename": code, "format": fmt},
                "nvram-template": {"filename": template, "format": fmt},
            },
            "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
            "features": [],
        }
        self.file(path, msgspec.json.encode(content | changes))


@pytest.fixture
def host(tmp_path: Path) -> FakeRoot:
    return FakeRoot(tmp_path)


def test_descriptors_are_believed_in_their_order_and_secure_boot_comes_last(host: FakeRoot) -> None:
    base = "usr/share/qemu/firmware"
    host.descriptor(f"{base}/40-secure.json", "/a/s.fd", "/a/sv.fd", features=["secure-boot", "requires-smm"])
    host.descriptor(f"{base}/60-plain.json", "/a/c.qcow2", "/a/v.qcow2", fmt="qcow2")
    host.descriptor(f"{base}/70-other.json", "/a/d.fd", "/a/dv.fd")
    found = find_uefi(root=host.root)
    assert [firmware.code for firmware in found] == ["/a/c.qcow2", "/a/d.fd", "/a/s.fd"]
    assert found[0].format is DiskFormat.QCOW2
    assert found[2].secure_boot
    assert require_uefi(root=host.root).vars == "/a/v.qcow2"


def test_the_administrators_descriptor_replaces_or_masks_the_distributions(host: FakeRoot) -> None:
    host.descriptor("usr/share/qemu/firmware/50-a.json", "/a/c.fd", "/a/v.fd")
    host.descriptor("usr/share/qemu/firmware/60-b.json", "/b/c.fd", "/b/v.fd")
    host.descriptor("etc/qemu/firmware/60-b.json", "/mine/c.fd", "/mine/v.fd")
    host.file("etc/qemu/firmware/50-a.json", b"")
    assert [firmware.code for firmware in find_uefi(root=host.root)] == ["/mine/c.fd"]


def test_descriptors_that_do_not_fit_are_passed_over(host: FakeRoot) -> None:
    base = "usr/share/qemu/firmware"
    arm = [{"architecture": "aarch64", "machines": ["virt-*"]}]
    micro = [{"architecture": "x86_64", "machines": ["microvm"]}]
    host.descriptor(f"{base}/1.json", "/1/c", "/1/v", targets=arm)
    host.descriptor(f"{base}/2.json", "/2/c", "/2/v", targets=micro)
    host.descriptor(f"{base}/3.json", "/3/c", "/3/v", mapping={"device": "memory", "filename": "/3/c"})
    host.descriptor(f"{base}/4.json", "/4/c", "/4/v", types="bios")
    host.descriptor(f"{base}/5.json", "/5/c", "/5/v", fmt="vmdk")
    host.descriptor(f"{base}/6.json", "/6/c", "/6/v")
    (host.root / "6/v").unlink()
    host.file(f"{base}/7.json", b"{broken")
    assert find_uefi(root=host.root) == ()
    assert [firmware.code for firmware in find_uefi("microvm", root=host.root)] == ["/2/c"]
    with pytest.raises(MicaError, match="no UEFI firmware") as caught:
        require_uefi(root=host.root)
    assert "apt-get install -y ovmf" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "template"),
    [
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ],
)
def test_without_descriptors_the_usual_places_are_looked_at(host: FakeRoot, code: str, template: str) -> None:
    host.file(code)
    assert find_uefi(root=host.root) == ()
    host.file(template)
    (found,) = find_uefi(root=host.root)
    assert (found.code, found.vars, found.described_by) == (code, template, "")
