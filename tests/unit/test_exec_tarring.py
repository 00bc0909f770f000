"""Packing and unpacking on the caller's side, against trees, tricks and cut streams."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mica.client.tarring import END, measure, pack, unpack
from mica.model.errors import Code, MicaError


async def collect(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in stream])


async def chunks(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def tree(root: Path) -> Path:
    source = root / "tree"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "a").write_bytes(os.urandom(3_000_000))
    (source / "sub" / ("long" * 60)).write_text("x")
    (source / "sub" / "ümlaut\n").write_bytes(b"")
    (source / "link").symlink_to("sub/empty")
    os.link(source / "a", source / "sub" / "hard")
    (source / "a").chmod(0o750)
    os.utime(source / "a", (1_000_000_000, 1_000_000_000.5))
    return source


def same(first: Path, second: Path) -> bool:
    return subprocess.run(["diff", "-r", first, second], check=False).returncode == 0


async def test_a_tree_goes_out_and_comes_back_the_same(tmp_path: Path) -> None:
    source = tree(tmp_path)
    seen: list[int] = []
    data = await collect(pack(source, "new", count=seen.append))
    assert seen[-1] == len(data)
    assert abs(measure(source) - len(data)) < 3_100_000  # a second name of a file is sent as a link
    landed = await unpack(chunks(data), tmp_path / "landed", count=seen.append)
    assert landed == tmp_path / "landed"
    assert same(source, landed)
    assert (landed / "link").readlink() == Path("sub/empty")
    assert (landed / "a").stat().st_mode & 0o777 == 0o750
    assert (landed / "a").stat().st_mtime == 1_000_000_000.5
    (tmp_path / "into").mkdir()
    assert await unpack(chunks(data), tmp_path / "into") == tmp_path / "into" / "new"


async def test_what_is_packed_is_what_tar_reads(tmp_path: Path) -> None:
    source = tree(tmp_path)
    (tmp_path / "t.tar").write_bytes(await collect(pack(source, "new")))
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "out", "-xpf", tmp_path / "t.tar"], check=True)
    assert same(source, tmp_path / "out" / "new")


async def test_what_tar_packs_is_unpacked(tmp_path: Path) -> None:
    source = tree(tmp_path)
    data = subprocess.run(["tar", "-C", tmp_path, "-cf", "-", "tree"], check=True, capture_output=True).stdout
    assert same(source, await unpack(chunks(data), tmp_path / "new"))


async def test_a_file_replaces_a_file_and_never_a_directory(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("new")
    (tmp_path / "dest").write_text("old")
    data = await collect(pack(tmp_path / "f", "f"))
    assert await unpack(chunks(data), tmp_path / "dest") == tmp_path / "dest"
    assert (tmp_path / "dest").read_text() == "new"
    (tmp_path / "d" / "f").mkdir(parents=True)
    with pytest.raises(MicaError, match="is there already") as caught:
        await unpack(chunks(data), tmp_path / "d")
    assert caught.value.code is Code.EXISTS
    assert clean(tmp_path)


def clean(directory: Path) -> bool:
    return not list(directory.rglob(".mica-cp-*"))


def member(name: str, **fields: object) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(b"x" * info.size))

    return add


@pytest.mark.parametrize(
    "tricks",
    [
        [member("../escape", size=1)],
        [member("a/../../escape", size=1)],
        [member("top", type=tarfile.SYMTYPE, linkname="../..")],
        [member("top", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [member("top", type=tarfile.DIRTYPE), member("top/l", type=tarfile.SYMTYPE, linkname="../../x")],
        [member("top", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")],
        [member("top", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
        [member("top", type=tarfile.FIFOTYPE)],
        [member("one", size=1), member("two", size=1)],
        [],
    ],
)
async def test_tricks_are_refused_and_leave_nothing(
    tmp_path: Path, tricks: list[Callable[[tarfile.TarFile], None]]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for trick in tricks:
            trick(tar)
    (tmp_path / "dest").mkdir()
    with pytest.raises(MicaError) as caught:
        await unpack(chunks(buffer.getvalue()), tmp_path / "dest")
    assert caught.value.code is Code.CORRUPT
    assert [p.name for p in tmp_path.rglob("*")] == ["dest"]


async def test_an_absolute_path_lands_inside(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member("/top", size=1)(tar)
    assert await unpack(chunks(buffer.getvalue()), tmp_path / "dest") == tmp_path / "dest"


@pytest.mark.parametrize("cut", [1, 512, 1024, 1025, 1536, 700_000])
async def test_a_cut_stream_is_never_taken_for_a_whole_one(tmp_path: Path, cut: int) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(os.urandom(1_000_000))
    (tmp_path / "d" / "b").write_bytes(b"")
    data = await collect(pack(tmp_path / "d", "d"))
    assert data.endswith(END)
    with pytest.raises(MicaError) as caught:
        await unpack(chunks(data[:-cut]), tmp_path / "dest")
    assert caught.value.code is Code.CORRUPT
    assert not (tmp_path / "dest").exists()
    assert clean(tmp_path)


async def test_garbage_is_refused(tmp_path: Path) -> None:
    for garbage in (b"", b"not a tar at all" * 1000, os.urandom(20_000), b"\0" * 512):
        with pytest.raises(MicaError) as caught:
            await unpack(chunks(garbage), tmp_path / "dest")
        assert caught.value.code is Code.CORRUPT
    assert list(tmp_path.iterdir()) == []


async def test_the_streams_own_error_is_the_answer_even_at_its_very_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    data = await collect(pack(tmp_path / "f", "f"))

    async def wrong() -> AsyncIterator[bytes]:
        yield data
        raise MicaError(Code.CORRUPT, "the checksum differs")

    with pytest.raises(MicaError, match="the checksum differs"):
        await unpack(wrong(), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    assert clean(tmp_path)


async def test_a_cancelled_copy_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(3_000_000))
    data = await collect(pack(tmp_path / "f", "f"))
    reached = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield data[:2_000_000]
        reached.set()
        await asyncio.sleep(0.2)
        yield data[2_000_000:]

    task = asyncio.create_task(unpack(slow(), tmp_path / "dest"))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


async def test_no_room_is_said_before_it_is_used(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    info = tarfile.TarInfo("big")
    info.size = shutil.disk_usage(tmp_path).total * 2
    buffer.write(info.tobuf())
    with pytest.raises(MicaError, match="no space for the copy") as caught:
        await unpack(chunks(buffer.getvalue()), tmp_path / "dest")
    assert caught.value.code is Code.INSUFFICIENT_DISK
    assert list(tmp_path.iterdir()) == []


async def test_what_cannot_be_packed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(MicaError, match="device, FIFO or socket"):
        await collect(pack(tmp_path / "fifo", "x"))
    with pytest.raises(MicaError, match="there is no file"):
        await collect(pack(tmp_path / "absent", "x"))
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(MicaError, match="not a name"):
            await collect(pack(tmp_path, name))
    with pytest.raises(MicaError, match="no directory"):
        await unpack(chunks(b""), tmp_path / "absent" / "dest")


async def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(5_000_000))
    stream = pack(path, "f")
    await anext(stream)
    os.truncate(path, 100)
    with pytest.raises(MicaError, match="became shorter"):
        await collect(stream)


async def test_a_big_stream_keeps_little_in_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(30_000_000))
    largest = 0
    async for piece in pack(tmp_path / "f", "f"):
        largest = max(largest, len(piece))
    assert largest <= 3 * 1024**2
