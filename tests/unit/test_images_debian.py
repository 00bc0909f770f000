"""The Debian image: what is refused, what is written, and a disk put together from a small tree."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mica.images import debian, debian_files, disk
from mica.images.commands import Commands
from mica.images.debian_files import Identity
from mica.images.disk import Layout
from mica.images.sources import Source
from mica.images.userns import Namespace
from mica.model.errors import Code, MicaError
from mica.model.image import DebianRecipe
from mica.model.units import GIB, MIB, Bytes

IDENTITY = Identity(
    disk="11111111-1111-1111-1111-111111111111",
    esp_partition="22222222-2222-2222-2222-222222222222",
    root_partition="33333333-3333-3333-3333-333333333333",
    root="44444444-4444-4444-4444-444444444444",
    esp_serial="abcd1234",
    entries="5" * 32,
)


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        (DebianRecipe(include=("vim; rm -rf /",)), "include"),
        (DebianRecipe(include=("--simulate",)), "include"),
        (DebianRecipe(hostname="no_underscores"), "hostname"),
        (DebianRecipe(hostname="x" * 64), "hostname"),
        (DebianRecipe(hostname="a\nb"), "hostname"),
        (DebianRecipe(size=Bytes(4 * GIB + 1)), "size"),
        (DebianRecipe(size=Bytes(1024**6)), "size"),
    ],
)
def test_impossible_recipes_are_refused_by_field(recipe: DebianRecipe, field: str) -> None:
    with pytest.raises(MicaError) as caught:
        debian.check(recipe)
    assert caught.value.code is Code.INVALID
    assert caught.value.details["field"] == field


def test_a_disk_too_small_says_how_large() -> None:
    with pytest.raises(MicaError) as caught:
        disk.check_size(1 * GIB, 1 * GIB)
    assert caught.value.code is Code.INVALID
    assert "this Debian needs 1.8 GiB" in caught.value.message
    assert caught.value.hint == "set the size to 2G or more"
    disk.check_size(caught.value.details["minimum"], 1 * GIB)


def test_entries_on_the_disk_sort_with_those_made_inside() -> None:
    files = debian_files.files(IDENTITY, "box", ())
    entry = debian_files.loader_entry(IDENTITY, "6.1.0-1", "Debian")
    assert f"MACHINE_ID={IDENTITY.entries}\n" in files["etc/kernel/install.conf"]
    assert f"machine-id {IDENTITY.entries}\n" in entry
    assert "initrd     /debian/6.1.0-1/initrd.img-6.1.0-1\n" in entry
    assert files["etc/kernel/cmdline"].strip() in entry
    assert files["etc/machine-id"] == ""
    assert "UUID=ABCD-1234 /boot/efi vfat" in files["etc/fstab"]
    assert "127.0.1.1 box" in files["etc/hosts"]


@pytest.mark.parametrize(
    ("host_key", "guest_key"),
    [
        ("", "/usr/share/keyrings/debian-archive-keyring.gpg"),
        ("/usr/share/keyrings/debian-archive-bookworm.gpg", "/usr/share/keyrings/debian-archive-keyring.gpg"),
        ("/etc/corp/key.gpg", ""),
        ("\n -----BEGIN PGP PUBLIC KEY BLOCK-----", "\n -----BEGIN PGP PUBLIC KEY BLOCK-----"),
    ],
)
def test_the_guest_knows_only_keys_that_it_has(host_key: str, guest_key: str) -> None:
    files = debian_files.files(IDENTITY, "box", (Source("http://m/debian", "bookworm", host_key),))
    text = files["etc/apt/sources.list.d/debian.sources"]
    assert "URIs: http://m/debian\n" in text
    assert ("Signed-By" in text) == bool(guest_key)
    assert guest_key in text


def test_progress_never_goes_back() -> None:
    seen: list[float] = []
    steps = debian._Steps(2, lambda fraction, text: seen.append(fraction or 0))
    for line in (
        "I: extracting archives...",
        "I: installing essential packages...",
        "Unpacking base (1) ...",
        "Setting up base (1) ...",
        "noise",
        "I: installing remaining packages inside the chroot...",
        "Unpacking more (1) ...",
        "update-initramfs: Generating /boot/initrd.img-6",
        "Setting up more (1) ...",
        "Setting up surprise (1) ...",
        "I: cleaning package lists and apt cache...",
        "I: creating tarball...",
    ):
        steps(line)
    assert seen == sorted(seen)
    assert seen[0] > 0.1
    assert seen[-1] <= 0.7


def test_a_user_without_subordinate_ids_is_told_what_to_do() -> None:
    nobody = 65534
    if shutil.which("newuidmap") is None or shutil.which("mmdebstrap") is None:
        pytest.skip("needs newuidmap and mmdebstrap")
    with pytest.raises(MicaError) as caught:
        Namespace(Commands(), uid=nobody).check()
    assert caught.value.code is Code.HOST_LACKS
    assert "usermod --add-subuids" in caught.value.hint


TOOLS = ("sfdisk", "mformat", "mke2fs", "qemu-img", "fsck.vfat", "e2fsck")


@pytest.mark.skipif(not all(shutil.which(t, path="/usr/sbin:/usr/bin:/sbin:/bin") for t in TOOLS), reason="needs tools")
async def test_a_disk_is_put_together_without_mounting(tmp_path: Path) -> None:
    commands, namespace = Commands(), Namespace(Commands(), uid=0)
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hello").write_text("world")
    (tree / "etc/hello").chmod(0o640)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(os.urandom(100_000))
    raw, layout = tmp_path / "disk.raw", Layout(1 * GIB, IDENTITY)
    await disk.partition(commands, raw, layout)
    await disk.fill_esp(commands, raw, IDENTITY, {"EFI/BOOT/BOOTX64.EFI": kernel, "debian/6/linux": kernel})
    await disk.fill_root(commands, namespace, raw, tree, layout)

    dump = await commands.output(["sfdisk", "--dump", str(raw)], timeout_s=30)
    assert f"label-id: {IDENTITY.disk}" in dump
    assert dump.count("uuid=") == 2
    assert await commands.run(["sfdisk", "--verify", str(raw)], timeout_s=30) == 0
    data = raw.read_bytes()
    esp, root = tmp_path / "esp", tmp_path / "root"
    esp.write_bytes(data[disk.ESP_START : disk.ESP_START + disk.ESP_SIZE])
    root.write_bytes(data[disk.ROOT_START : disk.ROOT_START + layout.root_size])
    assert await commands.run(["fsck.vfat", "-n", str(esp)], timeout_s=60) == 0
    assert await commands.run(["e2fsck", "-fn", str(root)], timeout_s=60) == 0
    subprocess.run(["mcopy", "-i", str(esp), "::debian/6/linux", str(tmp_path / "back")], check=True)
    assert (tmp_path / "back").read_bytes() == kernel.read_bytes()
    assert await commands.output(["debugfs", "-R", "cat /etc/hello", str(root)], timeout_s=30) == "world"

    await disk.to_qcow2(commands, raw, tmp_path / "disk.qcow2")
    assert (tmp_path / "disk.qcow2").stat().st_size < 64 * MIB
    compared = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(tmp_path / "disk.qcow2")]
    assert await commands.run(compared, timeout_s=60) == 0
