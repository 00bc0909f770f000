"""What the micro image is made of: archive, libraries, modules, scripts."""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mica.images import cpio, elf, kmod, micro, micro_files
from mica.model.errors import Code, MicaError


def archive(entries: dict[str, cpio.Entry]) -> bytes:
    file = io.BytesIO()
    cpio.write(file, entries)
    return file.getvalue()


def test_the_same_entries_are_the_same_bytes_in_any_order() -> None:
    entries = {"b": cpio.regular("two"), "a/c": cpio.regular("one"), "l": cpio.symlink("b")}
    assert archive(entries) == archive(dict(reversed(entries.items())))


def test_the_archive_is_what_the_kernel_documents() -> None:
    data = archive({"f": cpio.regular("abc", 0o640)})
    header, name, content = data[:110], data[110:112], data[112:116]
    assert header[:6] == b"070701"
    fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert fields == [1, 0o100640, 0, 0, 1, 0, 3, 0, 0, 0, 0, 2, 0]
    assert (name, content) == (b"f\0", b"abc\0")
    assert b"TRAILER!!!" in data


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    entries = {
        "etc/deep/file": cpio.regular("content", 0o600),
        "bin/link": cpio.symlink("../etc/deep/file"),
        "empty": cpio.directory(0o1777),
    }
    subprocess.run(["cpio", "-id", "--quiet"], input=archive(entries), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/link").read_text() == "content"
    assert (tmp_path / "etc/deep/file").stat().st_mode & 0o7777 == 0o600
    assert (tmp_path / "empty").stat().st_mode & 0o7777 == 0o1777
    listing = subprocess.run(
        ["cpio", "-itv", "--quiet"],
        input=archive({"dev/console": cpio.character_device(5, 1, 0o600)}),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    assert "crw-------" in listing
    assert "5,   1" in listing


def test_a_program_tells_its_interpreter_and_libraries() -> None:
    program = Path(shutil.which("ls") or sys.executable).resolve().read_bytes()
    needed = elf.needed(program)
    assert needed[0].startswith("/lib")
    assert "libc.so.6" in needed


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n", b"\x7fELF\x02\x01" + b"\xff" * 200])
def test_what_is_no_program_is_refused(data: bytes) -> None:
    with pytest.raises(elf.ElfError):
        elf.needed(data)


def module(name: str, depends: str = "", alias: str = "") -> tuple[str, bytes]:
    info = f"\0license=GPL\0depends={depends}\0alias={alias}\0name={name}\0"
    return f"lib/modules/6/{name}.ko", b"\x7fELF" + info.encode()


def test_a_module_tells_what_it_needs_and_serves() -> None:
    path, data = module("virtio-net", "net_failover,virtio", "virtio:d00000001v*")
    found = kmod.read_module(path, data)
    assert (found.name, found.depends, found.aliases) == (
        "virtio_net",
        ("net_failover", "virtio"),
        ("virtio:d00000001v*",),
    )
    assert kmod.read_module(f"{path}.xz", lzma.compress(data)) == found


def test_modules_come_after_what_they_need() -> None:
    modules = [
        kmod.read_module(*module("virtio", "virtio-ring")),
        kmod.read_module(*module("virtio_ring")),
        kmod.read_module(*module("virtio_pci", "virtio,virtio_ring")),
        kmod.read_module(*module("unwanted")),
    ]
    available = {m.name: m for m in modules}
    chosen = kmod.closure(["virtio_pci", "built_in"], available)
    assert [m.name for m in chosen] == ["virtio_ring", "virtio", "virtio_pci"]
    assert kmod.modules_dep(chosen) == (
        "virtio_ring.ko:\nvirtio.ko: virtio_ring.ko\nvirtio_pci.ko: virtio.ko virtio_ring.ko\n"
    )


def test_the_applets_are_read_from_the_program() -> None:
    table = b"[\0[[\0cat\0init\0modprobe\0mount\0sh\0udhcpc\0zcat\0\0"
    names = micro.applets(b"\x7fELF machine code \xff" + table + b"more\0[\0\0")
    assert names == ["[", "[[", "cat", "init", "modprobe", "mount", "sh", "udhcpc", "zcat"]
    with pytest.raises(MicaError) as caught:
        micro.applets(b"\x7fELF machine code")
    assert caught.value.code is Code.CORRUPT


def test_files_of_packages_are_found_through_links(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        data = tarfile.TarInfo("./usr/lib/libx.so.1.2")
        data.size = 3
        tar.addfile(data, io.BytesIO(b"lib"))
        for name, target in (("./usr/lib/libx.so.1", "libx.so.1.2"), ("./lib64/x", "../usr/lib/libx.so.1")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        loop = tarfile.TarInfo("./loop")
        loop.type, loop.linkname = tarfile.SYMTYPE, "loop"
        tar.addfile(loop)
    tree = micro.Tree()
    try:
        tree.add(tmp_path / "a.tar")
        assert tree.read("lib64/x") == b"lib"
        assert tree.read("loop") is None
        assert tree.need("absent", "usr/lib/libx.so.1") == b"lib"
        with pytest.raises(MicaError, match="absent"):
            tree.need("absent")
    finally:
        tree.close()


SCRIPTS = ["EARLY", "LATE", "NIC", "UDHCPC_SCRIPT", "AGENT", "SHUTDOWN"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guests_scripts_are_shell(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(getattr(micro_files, name))
    assert script.read_text().startswith("#!/bin/sh\n")
    shell = ["busybox", "sh"] if shutil.which("busybox") else ["sh"]
    subprocess.run([*shell, "-n", str(script)], check=True)
