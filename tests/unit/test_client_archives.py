"""Copies: archives packed and unpacked here, the tricks of a hostile guest among them, and the way there and back."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mica import Client, MicaError
from mica.cli.vm_cp import Place, parse_place
from mica.client.archives import CopyReport, measure, pack, unpack
from mica.client.vms import make_create
from mica.model.errors import TABLE, Code, not_found
from mica.model.exec import ExecView
from mica.model.operation import Actor
from tests.unit.client_fixtures import Engine, Served, mica, served


async def collect(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in stream])


async def pieces(data: bytes, size: int = 7000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def tree(root: Path) -> Path:
    source = root / "tree"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(1_000_000))
    (source / "big").chmod(0o640)
    (source / "sub" / ("long" * 50)).write_text("x")
    (source / "sub" / "ümlaut\n").write_bytes(b"")
    (source / "link").symlink_to("sub/empty")
    os.utime(source / "big", (1_000_000_000, 1_000_000_000))
    return source


def archive(*members: tuple[str, bytes | str | int], top: str = "top") -> bytes:
    """Members are a name and content, the target of a link, or a type of device."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, what in members:
            info = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
                continue
            info.type = tarfile.SYMTYPE if isinstance(what, str) else {0: tarfile.DIRTYPE}.get(what, tarfile.CHRTYPE)
            info.linkname = what if isinstance(what, str) else ""
            info.mode = 0o755
            tar.addfile(info)
    return out.getvalue()


async def test_a_tree_goes_there_and_comes_back_the_same(tmp_path: Path) -> None:
    source = tree(tmp_path)
    seen: list[tuple[int, int | None]] = []
    data = await collect(pack(source, "new", lambda done, total: seen.append((done, total))))
    assert measure(source) == CopyReport(files=4, bytes=1_000_001)  # type: ignore[arg-type]
    assert seen[-1] == (1_000_001, 1_000_001)
    report = await unpack(pieces(data), tmp_path / "back")
    assert (report.files, report.bytes, report.skipped) == (4, 1_000_001, ())
    back = tmp_path / "back"
    assert (back / "big").read_bytes() == (source / "big").read_bytes()
    assert (back / "big").stat().st_mode & 0o777 == 0o640
    assert (back / "big").stat().st_mtime == 1_000_000_000
    assert (back / "link").readlink() == Path("sub/empty")
    assert sorted(p.name for p in (back / "sub").iterdir()) == sorted(p.name for p in (source / "sub").iterdir())
    (tmp_path / "into").mkdir()
    await unpack(pieces(data), tmp_path / "into")
    assert (tmp_path / "into" / "new" / "big").exists()


async def test_what_is_there_is_replaced_or_joined(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "old").write_text("old")
    (tmp_path / "top" / "both").write_text("old")
    await unpack(pieces(archive(("top", 0), ("top/both", b"new"))), tmp_path)
    assert ((tmp_path / "top" / "old").read_text(), (tmp_path / "top" / "both").read_text()) == ("old", "new")
    with pytest.raises(MicaError, match="is a directory"):
        await unpack(pieces(archive(("top", b"a file"))), tmp_path)
    with pytest.raises(MicaError) as caught:
        await unpack(pieces(archive(("top", b"a file"))), tmp_path / "none" / "x")
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "top/../../up"])
async def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(MicaError) as caught:
        await unpack(pieces(archive((name, b"evil"))), tmp_path / "in")
    assert caught.value.code is Code.CORRUPT
    assert [p.name for p in tmp_path.rglob("*")] == ["in"]


async def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "in").mkdir()
    data = archive(("top", 0), ("top/way", "sub"), ("top/sub", 0), ("top/way/evil", b"evil"), ("top/out", str(outside)))
    report = await unpack(pieces(data), tmp_path / "in")
    assert report.skipped == ("top/out",)
    assert not list(outside.iterdir())
    assert (tmp_path / "in" / "top" / "way").is_dir()
    assert not (tmp_path / "in" / "top" / "way").is_symlink()


async def test_devices_and_links_that_lead_out_are_left_out_and_named(tmp_path: Path) -> None:
    data = archive(("top", 0), ("top/null", 3), ("top/mtab", "../../proc/mounts"), ("top/file", b"kept"))
    report = await unpack(pieces(data), tmp_path)
    assert report.skipped == ("top/null", "top/mtab")
    assert [p.name for p in (tmp_path / "top").iterdir()] == ["file"]


@pytest.mark.parametrize("keep", [100, 600, 5000])
async def test_a_stream_that_is_cut_or_no_archive_leaves_nothing(tmp_path: Path, keep: int) -> None:
    data = archive(("top", b"x" * 10_000))
    with pytest.raises(MicaError) as caught:
        await unpack(pieces(data[:keep]), tmp_path)
    assert caught.value.code is Code.CORRUPT
    with pytest.raises(MicaError):
        await unpack(pieces(b"no archive at all" * 1000), tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield archive(("top", b"x" * 100_000))[:50_000]
        raise not_found("guest", "any more")

    with pytest.raises(MicaError, match="any more"):
        await unpack(broken(), tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_copy_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield archive(("top", b"x" * 100_000))[:50_000]
        began.set()
        await asyncio.Event().wait()

    copying = asyncio.ensure_future(unpack(endless(), tmp_path))
    await began.wait()
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert list(tmp_path.iterdir()) == []


async def test_what_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(MicaError) as caught:
        measure(tmp_path / "none")
    assert caught.value.code is Code.NOT_FOUND
    growing = tmp_path / "file"
    growing.write_bytes(b"x" * 600_000)
    stream = pack(growing, "file")
    await anext(stream)
    os.truncate(growing, 10)
    with pytest.raises(MicaError, match="became shorter"):
        await collect(stream)


class Files(Engine):
    """One guest with a directory ``/tmp`` and what was copied into it, as archives."""

    broken = False
    checked_by = "sha256sum"

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, bytes] = {}
        self.sizes: list[int] = []

    async def _begin(self, record: ExecView) -> None:
        await self.end(record.id, 0 if record.spec.argv == ("test", "-d", "/tmp") else 1)

    async def copy_in(
        self, vm: str, dest: str, tar: AsyncIterator[bytes], *, by: Actor, size: int = 0
    ) -> dict[str, object]:
        await self.vm(vm)
        if dest != "/tmp":
            raise not_found("directory", dest)
        data = await collect(tar)
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            names = opened.getnames()
        self.kept[f"{dest}/{names[0]}"] = data
        self.sizes.append(size)
        return {"bytes": len(data), "checked_by": self.checked_by}

    async def copy_out(self, vm: str, path: str, *, by: Actor) -> AsyncIterator[bytes]:
        if path not in self.kept:
            raise not_found("file", path)
        data = self.kept[path]
        yield data[: len(data) // 2]
        if self.broken:
            raise OSError("the guest ended")
        yield data[len(data) // 2 :]


@pytest.fixture
def api() -> Iterator[Served]:
    with served(Files) as running:
        yield running


def guest(api: Served) -> Files:
    assert isinstance(api.engine, Files)
    return api.engine


async def test_into_a_guest_and_back(api: Served, tmp_path: Path) -> None:
    source = tree(tmp_path)
    async with Client(api.url) as client:
        await client.vms.create(make_create("", name="web", start=True))
        vm = await client.vms.get("web")
        await vm.copy_in(source, "/tmp")
        await vm.copy_in(source / "big", "/tmp/renamed")
        await vm.copy_in(str(source), "/tmp/")
        assert sorted(guest(api).kept) == ["/tmp/renamed", "/tmp/tree"]
        await vm.copy_out("/tmp/tree", tmp_path / "back")
        assert (tmp_path / "back" / "big").read_bytes() == (source / "big").read_bytes()
        for code, copy in (
            (Code.NOT_FOUND, vm.copy_in(source, "/none/x")),
            (Code.NOT_FOUND, vm.copy_out("/tmp/none", tmp_path)),
            (Code.NOT_FOUND, vm.copy_in(tmp_path / "none", "/tmp")),
            (Code.INVALID, vm.copy_in(source, "relative")),
            (Code.INVALID, vm.copy_out("relative", tmp_path)),
        ):
            with pytest.raises(MicaError) as caught:
                await copy
            assert caught.value.code is code


async def test_a_copy_that_breaks_off_leaves_nothing_and_says_so(api: Served, tmp_path: Path) -> None:
    source = tree(tmp_path)
    (tmp_path / "dest").mkdir()
    guest(api).broken = True
    async with Client(api.url) as client:
        await client.vms.create(make_create("", name="web", start=True))
        vm = await client.vms.get("web")
        await vm.copy_in(source, "/tmp")
        with pytest.raises(MicaError) as caught:
            await vm.copy_out("/tmp/tree", tmp_path / "dest")
    assert caught.value.code is Code.AGENT_FAILED
    assert "broke off" in caught.value.message
    assert list((tmp_path / "dest").iterdir()) == []


def test_cp_on_the_command_line(api: Served, tmp_path: Path) -> None:
    source = tree(tmp_path)

    def cp(*argv: str) -> Any:
        return mica("vm", "cp", *argv, url=api.url)

    mica("vm", "create", "--name", "web", "--start", url=api.url)
    assert cp(str(source), "web:/tmp/").out.startswith("4 files, 976.6 KiB, copied in ")
    assert cp("web:/tmp/tree", str(tmp_path / "back"), "--json").out == (
        '{\n  "files": 4,\n  "bytes": 1000001,\n  "skipped": [],\n  "verified": true\n}\n'
    )
    assert (tmp_path / "back" / "link").is_symlink()
    assert guest(api).sizes == [1_000_001]
    guest(api).checked_by = ""
    assert cp(str(source), "web:/tmp/").out.endswith("\nnot verified: the guest has no sha256sum, cksum or gzip\n")
    for argv, code in (
        ((str(source), "elsewhere"), Code.INVALID),
        (("web:/a", "web:/b"), Code.INVALID),
        (("web:", "x"), Code.INVALID),
        (("web:/tmp/tree", str(tmp_path / "none") + "/"), Code.NOT_FOUND),
        ((str(source), "nobody:/tmp"), Code.NOT_FOUND),
    ):
        assert cp(*argv).status == TABLE[code].exit_status, argv


def test_places() -> None:
    assert parse_place("web:/tmp") == Place("web", "/tmp")
    assert parse_place("./a:b") == Place("", "./a:b")
    assert parse_place("plain") == Place("", "plain")
    assert parse_place("/abs/x:y") == Place("", "/abs/x:y")
    assert parse_place(":x") == Place("", ":x")


@pytest.mark.parametrize("missing", [512, 1024])
async def test_an_archive_that_broke_off_is_refused(tmp_path: Path, missing: int) -> None:
    """Cut where a member ends, it reads like a whole one; only its end tells."""
    (tmp_path / "file").write_bytes(b"x" * 1000)
    whole = b"".join([piece async for piece in pack(tmp_path / "file", "file")])

    async def cut() -> AsyncIterator[bytes]:
        yield whole[:-missing]

    with pytest.raises(MicaError) as refused:
        await unpack(cut(), tmp_path / "copy")
    assert refused.value.code is Code.CORRUPT
    assert not (tmp_path / "copy").exists()
