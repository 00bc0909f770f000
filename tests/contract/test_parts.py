"""One suite for every place that keeps parts, and what a real directory owes beyond it."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat
from mica.model.units import GIB, MIB, Bytes
from mica.model.vm import DiskSpec
from mica.ports.parts import Parts
from mica.storage.branches import DirectoryBranches
from mica.storage.directory import DirectoryVolumes
from mica.storage.parts import DirectoryParts
from mica.testing.clock import VirtualClock
from mica.testing.simulated import SimulatedHost, SimulatedParts

PART, OTHER = "11111111-aaaa-4bbb-8ccc-00000000000a", "11111111-aaaa-4bbb-8ccc-00000000000b"


class Stand(Protocol):
    """Parts, and what others do to files."""

    parts: Parts

    def make(self, name: str, content: str = "content") -> Path:
        """A finished file outside the parts."""

    def put(self, path: Path, content: str) -> None: ...

    def exists(self, path: Path) -> bool: ...

    def read(self, part_id: str) -> str: ...

    def damage(self, part_id: str) -> None: ...


class SimulatedStand:
    def __init__(self) -> None:
        self.world = SimulatedHost(VirtualClock())
        self.parts: Parts = SimulatedParts(self.world)

    def make(self, name: str, content: str = "content") -> Path:
        path = Path("/simulated/made") / name
        self.put(path, content)
        return path

    def put(self, path: Path, content: str) -> None:
        self.world.storage.put(path, [content])

    def exists(self, path: Path) -> bool:
        return path in self.world.storage.there

    def read(self, part_id: str) -> str:
        return "".join(self.world.storage.read(self.parts.path(part_id)))

    def damage(self, part_id: str) -> None:
        self.world.storage.parts[part_id].damage = "a flipped bit"


class DirectoryStand:
    def __init__(self, root: Path, made: Path) -> None:
        self.made = made
        made.mkdir(exist_ok=True)
        self.parts: Parts = DirectoryParts(root)

    def make(self, name: str, content: str = "content") -> Path:
        path = self.made / name
        self.put(path, content)
        return path

    def put(self, path: Path, content: str) -> None:
        path.write_text(content)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def read(self, part_id: str) -> str:
        return self.parts.path(part_id).read_text()

    def damage(self, part_id: str) -> None:
        flip(self.parts.path(part_id), 3)


def flip(path: Path, at: int) -> None:
    """Flip one bit, as a disk would: whatever the file's mode is."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    path.chmod(mode)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than ``tmp_path``."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems: one for temporary files, and /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(params=["simulated", "directory", "directory, from another file system"])
def stand(request: pytest.FixtureRequest, tmp_path: Path) -> Stand:
    if request.param == "simulated":
        return SimulatedStand()
    if request.param == "directory":
        return DirectoryStand(tmp_path / "parts", tmp_path / "made")
    return DirectoryStand(tmp_path / "parts", request.getfixturevalue("elsewhere"))


def silent(fraction: float) -> None:
    del fraction


async def refused(code: Code, work: object) -> MicaError:
    assert asyncio.iscoroutine(work)
    with pytest.raises(MicaError) as caught:
        await work
    assert caught.value.code is code
    return caught.value


async def test_nothing_is_there_before_something_is_kept(stand: Stand) -> None:
    assert await stand.parts.present() == set()
    await stand.parts.remove(PART)
    await refused(Code.NOT_FOUND, stand.parts.seal(PART, silent))
    await refused(Code.NOT_FOUND, stand.parts.verify(PART, "x", silent))
    error = await refused(Code.NOT_FOUND, stand.parts.keep(PART, Path("/nowhere/at/all")))
    assert "/nowhere/at/all" in error.message


async def test_what_is_kept_moves(stand: Stand) -> None:
    source = stand.make("a")
    await stand.parts.keep(PART, source)
    assert not stand.exists(source)
    assert stand.exists(stand.parts.path(PART))
    assert stand.read(PART) == "content"
    assert await stand.parts.present() == {PART}
    await stand.parts.keep(PART, source)
    assert stand.read(PART) == "content"


async def test_what_is_kept_again_counts(stand: Stand) -> None:
    await stand.parts.keep(PART, stand.make("a", "first"))
    await stand.parts.keep(PART, stand.make("a", "second"))
    assert stand.read(PART) == "second"
    assert await stand.parts.present() == {PART}


async def test_what_is_in_a_scratch_directory_is_kept_or_dropped(stand: Stand) -> None:
    directory = await stand.parts.scratch("one")
    assert await stand.parts.scratch("one") == directory
    assert await stand.parts.scratch("two") != directory
    for name in ("a", "b"):
        stand.put(directory / name, "content")
    await stand.parts.keep(PART, directory / "a")
    assert stand.exists(directory / "b")
    assert await stand.parts.present() == {PART}
    for _ in range(2):
        await stand.parts.drop_scratch("one")
    assert not stand.exists(directory / "b")
    assert stand.read(PART) == "content"


async def test_a_seal_tells_contents_apart_and_is_the_same_again(stand: Stand) -> None:
    await stand.parts.keep(PART, stand.make("a", "content"))
    await stand.parts.keep(OTHER, stand.make("b", "Content"))
    seal = await stand.parts.seal(PART, silent)
    assert seal.size > 0
    assert seal.digest
    assert await stand.parts.seal(PART, silent) == seal
    other = await stand.parts.seal(OTHER, silent)
    assert other.digest != seal.digest
    await stand.parts.verify(PART, seal.digest, silent)
    error = await refused(Code.CORRUPT, stand.parts.verify(PART, other.digest, silent))
    assert PART in error.message


async def test_damage_is_found(stand: Stand) -> None:
    await stand.parts.keep(PART, stand.make("a"))
    seal = await stand.parts.seal(PART, silent)
    stand.damage(PART)
    await refused(Code.CORRUPT, stand.parts.verify(PART, seal.digest, silent))


async def test_removing_takes_the_part_alone(stand: Stand) -> None:
    for part in (PART, OTHER):
        await stand.parts.keep(part, stand.make(part))
        await stand.parts.seal(part, silent)
    await stand.parts.remove(PART)
    await stand.parts.remove(PART)
    assert await stand.parts.present() == {OTHER}
    await refused(Code.NOT_FOUND, stand.parts.verify(PART, "x", silent))


async def test_progress_ends_at_one(stand: Stand) -> None:
    await stand.parts.keep(PART, stand.make("a"))
    told: list[float] = []
    seal = await stand.parts.seal(PART, told.append)
    await asyncio.sleep(0)
    assert told[-1] == 1.0
    told.clear()
    await stand.parts.verify(PART, seal.digest, told.append)
    await asyncio.sleep(0)
    assert told[-1] == 1.0
    assert told == sorted(told)


async def test_a_simulated_disk_that_is_full() -> None:
    stand = SimulatedStand()
    source = stand.make("a")
    stand.world.disk_free = 0
    await refused(Code.INSUFFICIENT_DISK, stand.parts.keep(PART, source))
    assert stand.exists(source)
    stand.world.disk_free = MIB
    await stand.parts.keep(PART, source)
    assert stand.world.disk_free == 0
    await stand.parts.remove(PART)
    assert stand.world.disk_free == MIB


# A directory.


@pytest.fixture
def parts(tmp_path: Path) -> DirectoryParts:
    return DirectoryParts(tmp_path / "parts")


def sparse(path: Path, size: int, blocks: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for at, content in blocks.items():
            file.seek(at)
            file.write(content)
    return path


async def test_only_the_daemon_may_enter_and_nobody_may_write(parts: DirectoryParts, tmp_path: Path) -> None:
    source = sparse(tmp_path / "a", 10, {0: b"x"})
    source.chmod(0o666)
    await parts.keep(PART, source)
    path = parts.path(PART)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
@pytest.mark.parametrize("move", [True, False])
async def test_a_file_of_a_machine_becomes_the_daemons_own(
    parts: DirectoryParts, tmp_path: Path, elsewhere: Path, move: bool
) -> None:
    source = sparse((tmp_path if move else elsewhere) / "a", 10, {0: b"x"})
    os.chown(source, 54321, 54322)
    await parts.keep(PART, source)
    found = parts.path(PART).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o444)
    # A layer that was frozen still belongs to its machine.
    os.chown(parts.path(PART), 54321, 54322)
    parts.path(PART).chmod(0o600)
    await parts.seal(PART, silent)
    found = parts.path(PART).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o444)


async def test_holes_stay_holes_from_one_file_system_to_another(parts: DirectoryParts, elsewhere: Path) -> None:
    blocks = {0: b"begin" * 1000, 300 * MIB + 12345: b"middle", GIB - 3: b"end"}
    source = sparse(elsewhere / "a", GIB, blocks)
    await parts.keep(PART, source)
    path = parts.path(PART)
    assert path.stat().st_size == GIB
    assert path.stat().st_blocks * 512 <= 8 * MIB
    with path.open("rb") as file:
        for at, content in blocks.items():
            file.seek(at)
            assert file.read(len(content)) == content
    assert (await parts.seal(PART, silent)).size <= 8 * MIB


async def test_a_hole_is_as_good_as_zeroes(parts: DirectoryParts, tmp_path: Path) -> None:
    content = {5 * MIB + 17: b"data"}
    await parts.keep(PART, sparse(tmp_path / "a", 9 * MIB + 5, content))
    full = bytearray(9 * MIB + 5)
    full[5 * MIB + 17 : 5 * MIB + 21] = b"data"
    await parts.keep(OTHER, sparse(tmp_path / "b", len(full), {0: bytes(full)}))
    digest = (await parts.seal(PART, silent)).digest
    assert (await parts.seal(OTHER, silent)).digest == digest


@pytest.mark.parametrize(
    "other",
    [
        {"size": 9 * MIB},
        {"size": 9 * MIB + 6},
        {"at": 5 * MIB + 18},
        {"at": 6 * MIB + 17},
        {"content": b"dat\0"},
        {"content": b""},
    ],
)
async def test_whatever_differs_is_found(parts: DirectoryParts, tmp_path: Path, other: dict[str, object]) -> None:
    is_: dict[str, object] = {"size": 9 * MIB + 5, "at": 5 * MIB + 17, "content": b"data"}
    digests = []
    for about in (is_, is_ | other):
        size, at, content = about["size"], about["at"], about["content"]
        assert isinstance(size, int)
        assert isinstance(at, int)
        assert isinstance(content, bytes)
        await parts.keep(PART, sparse(tmp_path / "a", size, {at: content} if content else {}))
        digests.append((await parts.seal(PART, silent)).digest)
    assert digests[0] != digests[1]
    await refused(Code.CORRUPT, parts.verify(PART, digests[0], silent))


@pytest.mark.parametrize("length", [0, 1, MIB - 1, MIB, MIB + 1])
async def test_every_length_can_be_sealed_and_cut_short(parts: DirectoryParts, tmp_path: Path, length: int) -> None:
    await parts.keep(PART, sparse(tmp_path / "a", length, {0: b"x" * length}))
    seal = await parts.seal(PART, silent)
    await parts.verify(PART, seal.digest, silent)
    if length:
        os.truncate(parts.path(PART), length - 1)
        await refused(Code.CORRUPT, parts.verify(PART, seal.digest, silent))


async def test_each_bit_counts(parts: DirectoryParts, tmp_path: Path) -> None:
    size = 3 * MIB + 100
    await parts.keep(PART, sparse(tmp_path / "a", size, {MIB: b"x" * MIB}))
    seal = await parts.seal(PART, silent)
    for at in (0, MIB - 1, MIB, 2 * MIB - 1, 2 * MIB, size - 1):
        flip(parts.path(PART), at)
        await refused(Code.CORRUPT, parts.verify(PART, seal.digest, silent))
        flip(parts.path(PART), at)
        await parts.verify(PART, seal.digest, silent)


@pytest.mark.parametrize("do", [os.symlink, os.link])
async def test_a_link_to_another_file_is_not_kept(
    parts: DirectoryParts, tmp_path: Path, do: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    do(tmp_path / "secret", tmp_path / "a")
    await refused(Code.CORRUPT, parts.keep(PART, tmp_path / "a"))
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert await parts.present() == set()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a.layer.json", ".a.tmp", ".a", "-x", "a\n"])
async def test_an_id_cannot_lead_out_of_the_directory(parts: DirectoryParts, name: str) -> None:
    with pytest.raises(MicaError) as caught:
        parts.path(name)
    assert caught.value.code is Code.INVALID
    await refused(Code.INVALID, parts.remove(name))
    await refused(Code.INVALID, parts.scratch(name))
    await refused(Code.INVALID, parts.drop_scratch(name))


async def test_what_a_killed_daemon_left_is_there_for_the_reaper(parts: DirectoryParts, tmp_path: Path) -> None:
    await parts.keep(PART, sparse(tmp_path / "a", 10, {}))
    root = parts.path(PART).parent
    (root / f".{OTHER}.tmp").write_bytes(b"half")
    (root / f"{OTHER}-2.layer.json").write_bytes(b"{}")
    (root / f".{OTHER}-3.layer.json.tmp").write_bytes(b"{")
    (root / "lost+found").mkdir()
    assert await parts.present() == {PART, OTHER, f"{OTHER}-2", f"{OTHER}-3"}
    for part in await parts.present():
        await parts.remove(part)
    assert os.listdir(root) == ["lost+found"]


async def test_a_copy_that_was_interrupted_is_made_again(parts: DirectoryParts, elsewhere: Path) -> None:
    source = sparse(elsewhere / "a", 64 * MIB, {n * MIB: os.urandom(MIB) for n in range(64)})
    content = source.read_bytes()
    for turns in range(12):
        task = asyncio.create_task(parts.keep(PART, source))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert not parts.path(PART).exists() or parts.path(PART).read_bytes() == content
        assert source.exists() or parts.path(PART).exists()
    await parts.keep(PART, source)
    assert parts.path(PART).read_bytes() == content
    assert os.listdir(parts.path(PART).parent) == [PART]


async def test_a_checksum_can_be_cancelled(parts: DirectoryParts, tmp_path: Path) -> None:
    await parts.keep(PART, sparse(tmp_path / "a", 256 * MIB, {n * MIB: b"x" for n in range(256)}))
    told: list[float] = []
    begun = asyncio.Event()

    def report(fraction: float) -> None:
        told.append(fraction)
        begun.set()

    task = asyncio.create_task(parts.seal(PART, report))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await parts.seal(PART, silent)).digest


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = sparse(tmp_path / "a", GIB, {0: os.urandom(12 * MIB)})
    with mounted(tmp_path / "small", "10m"):
        parts = DirectoryParts(tmp_path / "small" / "parts")
        error = await refused(Code.INSUFFICIENT_DISK, parts.keep(PART, source))
        assert error.details["needed"] >= 12 * MIB
        assert await parts.present() == set()
        # Without a forecast, in the middle of it.
        parts = DirectoryParts(tmp_path / "small" / "parts", reserve=Bytes(-64 * MIB))
        await refused(Code.INSUFFICIENT_DISK, parts.keep(PART, source))
        assert await parts.present() == set()
        os.truncate(source, 6 * MIB)
        await parts.keep(PART, source)
        assert parts.path(PART).stat().st_size == 6 * MIB


async def test_the_record_of_a_layer_belongs_to_its_checksum(parts: DirectoryParts, tmp_path: Path) -> None:
    """Another record would make another disk of the same bytes."""
    volumes = DirectoryVolumes(tmp_path / "vms", "", None, parts=tmp_path / "parts")
    branches = DirectoryBranches(tmp_path / "vms", tmp_path / "parts", "")
    disk = DiskSpec(name="root", size=Bytes(MIB), format=DiskFormat.RAW)
    await volumes.create("vm", disk, None)
    await branches.freeze("vm", disk, PART)
    seal = await parts.seal(PART, silent)
    await parts.verify(PART, seal.digest, silent)
    record = parts.path(PART).with_name(f"{PART}.layer.json")
    content = record.read_bytes()
    for damaged in (content.replace(b"raw", b"qcow2", 1), None):
        record.unlink() if damaged is None else record.write_bytes(damaged)
        await refused(Code.CORRUPT, parts.verify(PART, seal.digest, silent))
    record.write_bytes(content)
    await parts.verify(PART, seal.digest, silent)
    await parts.remove(PART)
    assert await parts.present() == set()
    assert os.listdir(record.parent) == []


async def test_reading_can_be_held_to_a_rate_and_stopped(tmp_path: Path) -> None:
    parts, source = DirectoryParts(tmp_path / "parts"), tmp_path / "made"
    source.write_bytes(os.urandom(4 * MIB))
    await parts.keep(PART, source)
    seal = await parts.seal(PART, silent)
    began = asyncio.get_running_loop().time()
    await parts.verify(PART, seal.digest, silent, rate=Bytes(16 * MIB))
    assert asyncio.get_running_loop().time() - began >= 0.25
    reading = asyncio.ensure_future(parts.verify(PART, seal.digest, silent, rate=Bytes(1)))
    await asyncio.sleep(0.1)
    reading.cancel()  # at that rate it would take a month
    await asyncio.wait([reading], timeout=8.0)
    assert reading.cancelled()
