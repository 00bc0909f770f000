"""One suite for everything that makes layers of volumes: what snapshots, forks and restoring rely on."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from mica.model.errors import Code, MicaError
from mica.model.image import DiskFormat, Firmware
from mica.model.units import GIB, MIB, Bytes
from mica.model.vm import NVRAM, DiskSpec
from mica.ports.parts import Branches, Parts
from mica.ports.volumes import Volume, Volumes
from mica.storage.branches import DirectoryBranches
from mica.storage.chain import MAX_CHAIN
from mica.storage.directory import DirectoryVolumes
from mica.storage.parts import DirectoryParts
from mica.testing.clock import VirtualClock
from mica.testing.simulated import SimulatedBranches, SimulatedHost, SimulatedParts, SimulatedVolumes
from mica.testing.simulated_truth import parts as lies_about_parts

QEMU_IMG = shutil.which("qemu-img") or ""
QEMU_IO = shutil.which("qemu-io") or ""
VM, OTHER = "11111111-aaaa-4bbb-8ccc-000000000001", "11111111-aaaa-4bbb-8ccc-000000000002"
ROOT = DiskSpec(name="root", size=Bytes(8 * MIB))
DATA = DiskSpec(name="data", size=Bytes(4 * MIB), format=DiskFormat.RAW)
VARIABLES = DiskSpec(name=NVRAM, size=Bytes(MIB))
TOKENS = "abcdefgh"

needs_programs = pytest.mark.skipif(
    not (QEMU_IMG and QEMU_IO), reason="needs qemu-img and qemu-io (package qemu-utils)"
)


class Stand(Protocol):
    """Storage, and machines that write to it. A token is something that can be read again from where it was written."""

    volumes: Volumes
    branches: Branches
    parts: Parts

    def write(self, volume: Volume, token: str) -> None: ...

    def read(self, volume: Volume) -> str:
        """All tokens that the disk has, in alphabetical order."""

    def used(self) -> int:
        """Bytes that are taken on the host, roughly: whole files count."""


class SimulatedStand:
    def __init__(self) -> None:
        self.world = SimulatedHost(VirtualClock())
        self.volumes: Volumes = SimulatedVolumes(self.world)
        self.branches: Branches = SimulatedBranches(self.world)
        self.parts: Parts = SimulatedParts(self.world)
        self._free = self.world.disk_free

    def write(self, volume: Volume, token: str) -> None:
        self.world.storage.there[volume.path].write(token)

    def read(self, volume: Volume) -> str:
        return "".join(sorted(self.world.storage.read(volume.path)))

    def used(self) -> int:
        return self._free - self.world.disk_free


class DirectoryStand:
    """Each token has a sector of its own, written and read by QEMU's own block drivers."""

    def __init__(self, tmp_path: Path) -> None:
        self.home = tmp_path
        self.root = tmp_path / "parts"
        template = tmp_path / "OVMF_VARS.fd"
        template.write_bytes(b"vars" * 16 * 1024)
        (tmp_path / "images").mkdir()
        images = (tmp_path / "images",)
        self.volumes: Volumes = DirectoryVolumes(
            tmp_path / "vms", QEMU_IMG, template, bases=images, parts=tmp_path / "parts"
        )
        self.branches: Branches = DirectoryBranches(tmp_path / "vms", tmp_path / "parts", QEMU_IMG, bases=images)
        self.parts: Parts = DirectoryParts(tmp_path / "parts")

    def write(self, volume: Volume, token: str) -> None:
        run(QEMU_IO, "-f", volume.format, "-c", f"write -P {ord(token)} {TOKENS.index(token) * 512} 512", volume.path)

    def read(self, volume: Volume) -> str:
        out = self.home / "read.raw"
        run(QEMU_IMG, "convert", "-U", "-f", volume.format, "-O", "raw", volume.path, out)
        with out.open("rb") as file:
            content = file.read(512 * len(TOKENS))
        return "".join(t for n, t in enumerate(TOKENS) if content[n * 512 : n * 512 + 512] == t.encode() * 512)

    def used(self) -> int:
        files = [path.lstat() for path in self.home.rglob("*") if path.is_file()]
        return sum({f.st_ino: f.st_blocks * 512 for f in files}.values())


def run(*argv: object) -> str:
    return subprocess.run([str(arg) for arg in argv], check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=["simulated", pytest.param("directory", marks=needs_programs)])
def stand(request: pytest.FixtureRequest, tmp_path: Path) -> Stand:
    return SimulatedStand() if request.param == "simulated" else DirectoryStand(tmp_path)


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStand:
    if not (QEMU_IMG and QEMU_IO):
        pytest.skip("needs qemu-img and qemu-io (package qemu-utils)")
    return DirectoryStand(tmp_path)


async def refused(code: Code, work: Coroutine[Any, Any, object]) -> MicaError:
    with pytest.raises(MicaError) as caught:
        await work
    assert caught.value.code is code
    return caught.value


async def prepared(stand: Stand, vm_id: str, disk: DiskSpec) -> Volume:
    if disk.name == NVRAM:
        found = await stand.volumes.nvram(vm_id, Firmware.UEFI, None)
        assert found is not None
        return found
    return (await stand.volumes.prepare(vm_id, (disk,), None))[0]


async def made(stand: Stand, disk: DiskSpec, token: str = "a") -> Volume:
    """A disk that has something on it."""
    if disk.name != NVRAM:
        await stand.volumes.create(VM, disk, None)
    volume = await prepared(stand, VM, disk)
    stand.write(volume, token)
    return volume


async def snapshot(stand: Stand, disk: DiskSpec, part_id: str) -> Volume:
    """What all snapshots of a stopped VM do with a disk."""
    await stand.branches.freeze(VM, disk, part_id)
    staged = await stand.branches.stage(VM, disk, stand.parts.path(part_id), None)
    await stand.branches.take(VM)
    return staged


async def content(stand: Stand, part_id: str, disk: DiskSpec = ROOT) -> str:
    """What a new VM would see that begins at a part."""
    wish = msgspec.structs.replace(disk, size=Bytes(8 * MIB), format=DiskFormat.QCOW2)
    volume = await stand.volumes.create(OTHER, wish, stand.parts.path(part_id))
    found = stand.read(volume)
    await stand.volumes.remove(OTHER)
    return found


disks = pytest.mark.parametrize("disk", [ROOT, DATA, VARIABLES], ids=["qcow2", "raw", "variables"])


@disks
async def test_a_snapshot_keeps_what_was_there_and_the_vm_goes_on(stand: Stand, disk: DiskSpec) -> None:
    before = await made(stand, disk)
    staged = await snapshot(stand, disk, "p1")
    present = await prepared(stand, VM, disk)
    assert present == staged
    assert present.path != before.path
    assert (present.format, present.size) == (DiskFormat.QCOW2, before.size)
    assert present.backing == (stand.parts.path("p1"),)
    stand.write(present, "b")
    assert stand.read(present) == "ab"
    assert await content(stand, "p1", disk) == "a"
    assert await stand.parts.present() == {"p1"}
    assert await stand.volumes.owners() == {VM}


@disks
async def test_every_verb_can_be_repeated(stand: Stand, disk: DiskSpec) -> None:
    await made(stand, disk)
    base = stand.parts.path("p1")
    for _ in range(2):
        await stand.branches.freeze(VM, disk, "p1")
    staged = [await stand.branches.stage(VM, disk, base, None) for _ in range(2)]
    assert staged[0] == staged[1]
    for _ in range(2):
        await stand.branches.take(VM)
    present = await prepared(stand, VM, disk)
    assert present == staged[0]
    assert stand.read(present) == "a"
    for _ in range(2):
        await stand.branches.unstage(VM)
    assert await prepared(stand, VM, disk) == present


async def test_what_a_machine_wrote_to_a_staged_layer_survives_repeating(stand: Stand) -> None:
    """A machine that lives moves onto the staged layer before it is taken, and the daemon may die in between."""
    await made(stand, ROOT)
    await stand.branches.freeze(VM, ROOT, "p1")
    staged = await stand.branches.stage(VM, ROOT, stand.parts.path("p1"), None)
    stand.write(staged, "b")
    assert await stand.branches.stage(VM, ROOT, stand.parts.path("p1"), None) == staged
    await stand.branches.take(VM)
    assert stand.read(await prepared(stand, VM, ROOT)) == "ab"


async def test_a_machine_writes_on_while_its_disk_is_frozen(stand: Stand) -> None:
    before = await made(stand, ROOT)
    await stand.branches.freeze(VM, ROOT, "p1")
    await stand.branches.stage(VM, ROOT, stand.parts.path("p1"), None)
    stand.write(before, "b")
    await stand.branches.take(VM)
    assert await content(stand, "p1") == "ab"
    assert stand.read(await prepared(stand, VM, ROOT)) == "ab"


@disks
async def test_unstaging_leaves_all_as_it_was(stand: Stand, disk: DiskSpec) -> None:
    before = await made(stand, disk)
    used = stand.used()
    await stand.branches.freeze(VM, disk, "p1")
    await stand.branches.stage(VM, disk, stand.parts.path("p1"), None)
    assert stand.used() > used
    await stand.branches.unstage(VM)
    await stand.parts.remove("p1")
    assert stand.used() == used
    assert await prepared(stand, VM, disk) == before
    stand.write(before, "b")
    assert stand.read(before) == "ab"
    assert await stand.parts.present() == set()
    await stand.branches.take(VM)
    assert await prepared(stand, VM, disk) == before


async def test_all_disks_of_a_vm_are_taken_together(stand: Stand) -> None:
    assert await stand.branches.disks(VM) == set()
    for disk in (ROOT, DATA, VARIABLES):
        await made(stand, disk)
        await stand.branches.freeze(VM, disk, f"p-{disk.name}")
        await stand.branches.stage(VM, disk, stand.parts.path(f"p-{disk.name}"), None)
    assert await stand.branches.disks(VM) == {"root", "data", NVRAM}
    await stand.branches.take(VM)
    assert await stand.branches.disks(VM) == {"root", "data", NVRAM}
    for disk in (ROOT, DATA, VARIABLES):
        assert (await prepared(stand, VM, disk)).backing == (stand.parts.path(f"p-{disk.name}"),)


@disks
async def test_a_series_of_snapshots_and_the_way_back(stand: Stand, disk: DiskSpec) -> None:
    await made(stand, disk)
    for number, token in enumerate("bcd"):
        await snapshot(stand, disk, f"p{number}")
        stand.write(await prepared(stand, VM, disk), token)
    assert stand.read(await prepared(stand, VM, disk)) == "abcd"
    assert [await content(stand, f"p{n}", disk) for n in range(3)] == ["a", "ab", "abc"]
    # Back to the first, with the present state as a snapshot; and forth again.
    await stand.branches.freeze(VM, disk, "safety")
    for base, expected in (("p0", "a"), ("safety", "abcd"), ("p1", "ab")):
        await stand.branches.stage(VM, disk, stand.parts.path(base), None)
        await stand.branches.take(VM)
        present = await prepared(stand, VM, disk)
        assert stand.read(present) == expected
        stand.write(present, "h")
    assert await content(stand, "safety", disk) == "abcd"
    assert await content(stand, "p1", disk) == "ab"


async def test_going_back_without_keeping_the_present_frees_its_space(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    stand.write(await prepared(stand, VM, ROOT), "b")
    used = stand.used()
    await stand.branches.stage(VM, ROOT, stand.parts.path("p1"), None)
    await stand.branches.take(VM)
    assert stand.used() <= used
    present = await prepared(stand, VM, ROOT)
    assert stand.read(present) == "a"
    assert await stand.volumes.usage(VM) <= 2 * MIB


async def test_staging_over_another_base_replaces_what_was_staged(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    stand.write(await prepared(stand, VM, ROOT), "b")
    await stand.branches.freeze(VM, ROOT, "p2")
    staged = await stand.branches.stage(VM, ROOT, stand.parts.path("p2"), None)
    stand.write(staged, "h")
    used = stand.used()
    other = await stand.branches.stage(VM, ROOT, stand.parts.path("p1"), None)
    assert other.backing == (stand.parts.path("p1"),)
    assert stand.used() <= used
    await stand.branches.take(VM)
    assert stand.read(await prepared(stand, VM, ROOT)) == "a"


async def test_a_disk_that_the_vm_has_not_now_comes_back(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    lost = DiskSpec(name="lost", size=Bytes(8 * MIB))
    for vm_id in (VM, OTHER):
        await stand.branches.stage(vm_id, lost, stand.parts.path("p1"), None)
        await stand.branches.take(vm_id)
        present = await prepared(stand, vm_id, lost)
        assert stand.read(present) == "a"
    assert await stand.volumes.owners() == {VM, OTHER}


async def test_a_fork_of_a_fork_is_apart_from_all_others(stand: Stand) -> None:
    for disk in (ROOT, VARIABLES):
        await made(stand, disk)
        await snapshot(stand, disk, f"p-{disk.name}")
        fork = await stand.volumes.create(OTHER, disk, stand.parts.path(f"p-{disk.name}"))
        assert await prepared(stand, OTHER, disk) == fork
        stand.write(fork, "b")
        await stand.branches.freeze(OTHER, disk, f"f-{disk.name}")
        await stand.branches.stage(OTHER, disk, stand.parts.path(f"f-{disk.name}"), None)
        await stand.branches.take(OTHER)
        grandchild = await stand.volumes.create("third", disk, stand.parts.path(f"f-{disk.name}"))
        stand.write(grandchild, "c")
        assert grandchild.backing == (stand.parts.path(f"f-{disk.name}"), stand.parts.path(f"p-{disk.name}"))
        assert stand.read(grandchild) == "abc"
        assert stand.read(await prepared(stand, OTHER, disk)) == "ab"
        assert stand.read(await prepared(stand, VM, disk)) == "a"


async def test_variables_are_as_large_as_those_they_come_from(stand: Stand) -> None:
    size = (await made(stand, VARIABLES)).size
    await snapshot(stand, VARIABLES, "p1")
    wish = msgspec.structs.replace(VARIABLES, size=Bytes(size + MIB), format=DiskFormat.RAW)
    fork = await stand.volumes.create(OTHER, wish, stand.parts.path("p1"))
    assert (fork.name, fork.size, fork.format) == (NVRAM, size, DiskFormat.QCOW2)


async def test_a_disk_grows_over_its_layers(stand: Stand) -> None:
    await made(stand, ROOT)
    staged = await snapshot(stand, ROOT, "p1")
    assert staged.size == ROOT.size
    larger = msgspec.structs.replace(ROOT, size=Bytes(16 * MIB))
    assert (await prepared(stand, VM, larger)).size == 16 * MIB
    assert (await snapshot(stand, ROOT, "p2")).size == 16 * MIB
    assert stand.read(await prepared(stand, VM, larger)) == "a"


async def test_what_is_not_there_cannot_be_frozen_and_is_no_base(stand: Stand) -> None:
    await refused(Code.NOT_FOUND, stand.branches.freeze(VM, ROOT, "p1"))
    await made(stand, ROOT)
    error = await refused(Code.NOT_FOUND, stand.branches.stage(VM, ROOT, stand.parts.path("p1"), None))
    assert "p1" in error.message
    assert await stand.parts.present() == set()


async def test_a_part_is_never_another_file(stand: Stand) -> None:
    await made(stand, ROOT)
    await made(stand, DATA, "b")
    await stand.branches.freeze(VM, ROOT, "p1")
    await refused(Code.EXISTS, stand.branches.freeze(VM, DATA, "p1"))
    assert await content(stand, "p1") == "a"


async def test_a_part_below_a_disk_that_is_gone_is_named(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    await snapshot(stand, ROOT, "p2")
    await stand.parts.remove("p1")
    for work in (
        prepared(stand, VM, ROOT),
        stand.volumes.create(OTHER, ROOT, stand.parts.path("p2")),
        stand.branches.stage(VM, ROOT, stand.parts.path("p2"), None),
    ):
        assert "p1" in (await refused(Code.NOT_FOUND, work)).message


async def test_a_chain_is_bounded_and_says_the_way_out(stand: Stand) -> None:
    await made(stand, ROOT)
    for number in range(MAX_CHAIN - 1):
        await snapshot(stand, ROOT, f"p{number}")
    present = await prepared(stand, VM, ROOT)
    assert len(present.backing) == MAX_CHAIN - 1
    await stand.branches.freeze(VM, ROOT, "last")
    error = await refused(Code.STATE_CONFLICT, stand.branches.stage(VM, ROOT, stand.parts.path("last"), None))
    assert f"over {MAX_CHAIN} other files" in error.message
    assert f"at most {MAX_CHAIN - 1}" in error.message
    await refused(Code.STATE_CONFLICT, stand.volumes.create(OTHER, ROOT, stand.parts.path("last")))
    await stand.branches.unstage(VM)
    await stand.parts.remove("last")
    assert await prepared(stand, VM, ROOT) == present
    assert await stand.volumes.owners() == {VM}


async def test_removing_a_vm_takes_what_is_staged_and_leaves_the_parts(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    used = stand.used()
    await stand.branches.freeze(VM, ROOT, "p2")
    await stand.branches.stage(VM, ROOT, stand.parts.path("p2"), None)
    await stand.volumes.remove(VM)
    assert stand.used() <= used
    assert await stand.volumes.owners() == set()
    assert await content(stand, "p2") == "a"
    for part in ("p1", "p2"):
        await stand.parts.remove(part)
    assert await stand.parts.present() == set()
    await stand.branches.take(VM)
    await stand.branches.unstage(VM)


async def test_a_sealed_layer_verifies_however_much_is_written_above(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    seal = await stand.parts.seal("p1", lambda fraction: None)
    stand.write(await prepared(stand, VM, ROOT), "b")
    await snapshot(stand, ROOT, "p2")
    await stand.parts.verify("p1", seal.digest, lambda fraction: None)
    assert (await stand.parts.seal("p2", lambda fraction: None)).digest != seal.digest


# The simulated world tells lies.


async def test_the_simulated_world_finds_parts_of_nobody_and_those_that_are_gone() -> None:
    stand = SimulatedStand()
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    assert lies_about_parts(stand.world, {"p1"}) == []
    assert lies_about_parts(stand.world, set()) == ["part p1 is of nobody"]
    await stand.parts.remove("p1")
    found = lies_about_parts(stand.world, {"p1"})
    assert found[0] == "part p1 has no file"
    assert "root.1.qcow2 lies over parts ['p1'], which are gone" in found[1]


async def test_a_simulated_machine_that_writes_to_a_part_is_a_fault() -> None:
    stand = SimulatedStand()
    before = await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    frozen = msgspec.structs.replace(before, path=stand.parts.path("p1"))
    with pytest.raises(AssertionError, match="never changes"):
        stand.write(frozen, "b")


# A directory.


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


async def test_what_is_where(directory: DirectoryStand) -> None:
    await made(directory, ROOT)
    await made(directory, VARIABLES)
    for disk in (ROOT, VARIABLES):
        await snapshot(directory, disk, f"p-{disk.name}")
    assert tree(directory.home / "vms" / VM) == [
        "nvram_vars.1.qcow2",
        "nvram_vars.volume.json",
        "root.1.qcow2",
        "root.volume.json",
        "running",
    ]
    assert tree(directory.root) == ["p-nvram", "p-nvram.layer.json", "p-root", "p-root.layer.json"]
    for path in (directory.home / "vms" / VM).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((directory.root / "p-root").stat().st_mode) == 0o444
    assert stat.S_IMODE(directory.root.stat().st_mode) == 0o700


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
async def test_a_layer_belongs_to_its_machine_and_a_part_to_the_daemon(directory: DirectoryStand) -> None:
    await made(directory, ROOT)
    volume = (await directory.volumes.prepare(VM, (ROOT,), (54321, 54322)))[0]
    await directory.branches.freeze(VM, ROOT, "p1")
    staged = await directory.branches.stage(VM, ROOT, directory.root / "p1", (54321, 54322))
    assert (staged.path.stat().st_uid, staged.path.stat().st_gid) == (54321, 54322)
    # The machine may still be writing to it.
    assert volume.path.stat().st_uid == 54321
    await directory.branches.take(VM)
    found = (directory.root / "p1").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o444)


@contextmanager
def opened(path: Path, format_: str) -> Iterator[Callable[[str], None]]:
    """A real block driver of QEMU that has the image open for writing, as a machine would; gives it commands."""
    argv = [QEMU_IO, "-f", format_, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:

        def command(words: str) -> None:
            """Return when it has been done. One at a time: it looks for the next only where something new comes."""
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{words}\n".encode())
            process.stdin.flush()
            while not (line := process.stdout.readline()).strip().endswith((b"iB", b"ops/sec)")):
                assert line, "qemu-io ended"

        try:
            command("length")
            yield command
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        finally:
            process.kill()


@pytest.mark.parametrize("disk", [ROOT, DATA], ids=["qcow2", "raw"])
async def test_a_disk_is_frozen_and_staged_while_a_machine_has_it_locked(
    directory: DirectoryStand, disk: DiskSpec
) -> None:
    volume = await made(directory, disk)
    with opened(volume.path, volume.format) as command:
        await directory.branches.freeze(VM, disk, "p1")
        staged = await directory.branches.stage(VM, disk, directory.root / "p1", None)
        command(f"write -P {ord('b')} 512 512")
        assert await directory.branches.stage(VM, disk, directory.root / "p1", None) == staged
    await directory.branches.take(VM)
    assert directory.read(await prepared(directory, VM, disk)) == "ab"


class KilledError(Exception):
    """The daemon is killed here."""


CALLS = ("rename", "unlink", "link", "mkdir", "chmod", "fchmod", "open")


def killer(monkeypatch: pytest.MonkeyPatch, home: Path, at: int) -> Callable[[], int]:
    """Have the ``at``-th call that could change something in ``home`` not happen, nor any after it.

    Returns how many there were.
    """
    counter = itertools.count(1)
    seen = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *arguments: Any, **how: Any) -> Any:
            nonlocal seen
            if isinstance(first, int) or Path(first).is_relative_to(home):
                seen = next(counter)
                if seen >= at:
                    raise KilledError
            return real(first, *arguments, **how)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return lambda: seen


SOME = (DATA, VARIABLES)


async def whole_snapshot(stand: DirectoryStand, part: str) -> None:
    for disk in SOME:
        await stand.branches.freeze(VM, disk, f"{part}-{disk.name}")
    for disk in SOME:
        await stand.branches.stage(VM, disk, stand.root / f"{part}-{disk.name}", None)
    await stand.branches.take(VM)


@pytest.mark.parametrize("forward", [True, False], ids=["finished", "taken back"])
async def test_a_daemon_that_is_killed_anywhere_leaves_nothing_that_repeating_does_not_mend(
    directory: DirectoryStand, monkeypatch: pytest.MonkeyPatch, forward: bool
) -> None:
    """Killed at each call that changes the disk in turn, cleaning up included."""
    for disk in SOME:
        await made(directory, disk)
    shutil.copytree(directory.home / "vms", directory.home / "as it was")
    for at in itertools.count(1):
        part = f"p{at}"
        with monkeypatch.context() as patched:
            count = killer(patched, directory.home, at)
            with suppress(KilledError):
                await whole_snapshot(directory, part)
            reached = count() >= at
        if forward or not any((directory.home / "vms" / VM).glob(".*.staged.json")):
            await finish(directory, part)
        else:
            # Only what has not been taken can be taken back.
            await directory.branches.unstage(VM)
        await check_whole(directory)
        await restart(directory)
        if not reached:
            break
    assert at > 20


async def finish(stand: DirectoryStand, part: str) -> None:
    """What the engine does after a crash: the verbs that have not been done, again; those that have may be again."""
    for disk in SOME:
        frozen = stand.root / f"{part}-{disk.name}"
        layer = await prepared(stand, VM, disk)
        if frozen not in layer.backing:
            await stand.branches.freeze(VM, disk, frozen.name)
            await stand.branches.stage(VM, disk, frozen, None)
    await stand.branches.take(VM)
    for disk in SOME:
        assert (await prepared(stand, VM, disk)).backing[0] == stand.root / f"{part}-{disk.name}"


async def check_whole(stand: DirectoryStand) -> None:
    present = [await prepared(stand, VM, disk) for disk in SOME]
    for volume in present:
        assert stand.read(volume) == "a"
    await stand.branches.take(VM)
    files = {path.name for path in (stand.home / "vms" / VM).iterdir() if path.suffix in (".qcow2", ".raw")}
    assert files == {volume.path.name for volume in present}


async def restart(stand: DirectoryStand) -> None:
    """The same VM as it was, without parts."""
    for part in await stand.parts.present():
        await stand.parts.remove(part)
    assert tree(stand.root) == []
    shutil.rmtree(stand.home / "vms")
    shutil.copytree(stand.home / "as it was", stand.home / "vms")


async def test_a_cancelled_stage_leaves_nothing_and_can_be_repeated(directory: DirectoryStand) -> None:
    before = await made(directory, ROOT)
    await directory.branches.freeze(VM, ROOT, "p1")
    for turns in range(16):
        task = asyncio.create_task(directory.branches.stage(VM, ROOT, directory.root / "p1", None))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert not [name for name in tree(directory.home / "vms") if name.endswith(".tmp")]
        await directory.branches.unstage(VM)
        assert await prepared(directory, VM, ROOT) == before
    assert tree(directory.home / "vms" / VM) == ["root.qcow2", "root.volume.json", "running"]


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
@pytest.mark.parametrize("reserve", [GIB, -GIB], ids=["forecast", "in the middle"])
async def test_a_full_disk(tmp_path: Path, reserve: int) -> None:
    with mounted(tmp_path / "small", "20m"):
        stand = DirectoryStand(tmp_path / "small")
        stand.branches = DirectoryBranches(tmp_path / "small" / "vms", stand.root, QEMU_IMG, reserve=Bytes(reserve))
        before = await made(stand, ROOT)
        await stand.branches.freeze(VM, ROOT, "p1")
        ballast = tmp_path / "small" / "ballast"
        status = os.statvfs(tmp_path / "small")
        ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - 64 * 1024))
        was = tree(tmp_path / "small")
        await refused(Code.INSUFFICIENT_DISK, stand.branches.stage(VM, ROOT, stand.root / "p1", None))
        assert tree(tmp_path / "small") == was
        assert await prepared(stand, VM, ROOT) == before
        ballast.unlink()
        await stand.branches.stage(VM, ROOT, stand.root / "p1", None)
        await stand.branches.take(VM)
        assert stand.read(await prepared(stand, VM, ROOT)) == "a"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_parts_on_another_file_system_are_refused_in_words(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "20m"):
        stand = DirectoryStand(tmp_path)
        await made(stand, ROOT)
        branches = DirectoryBranches(tmp_path / "vms", tmp_path / "small" / "parts", QEMU_IMG)
        error = await refused(Code.HOST_LACKS, branches.freeze(VM, ROOT, "p1"))
        assert "one file system" in error.hint
        assert tree(tmp_path / "small" / "parts") == []


# What a guest that escaped into its QEMU could do.


async def test_a_raw_disk_that_looks_like_a_layer_over_a_secret_is_raw(directory: DirectoryStand) -> None:
    volume = await made(directory, DATA)
    secret = directory.home / "images" / "secret"
    secret.write_bytes(b"a" * MIB)
    trojan = directory.home / "trojan"
    run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, trojan, "4M")
    with volume.path.open("r+b") as file:
        file.write(trojan.read_bytes())
    await snapshot(directory, DATA, "p1")
    fork = await directory.volumes.create(OTHER, ROOT, directory.root / "p1")
    assert fork.backing == (directory.root / "p1",)
    (present,) = await directory.volumes.prepare(VM, (DATA,), None)
    assert present.backing == (directory.root / "p1",)
    out = directory.home / "seen"
    run(QEMU_IMG, "convert", "-f", "qcow2", "-O", "raw", fork.path, out)
    assert out.read_bytes().startswith(b"QFI\xfb")


async def test_a_part_whose_header_was_changed_is_refused(directory: DirectoryStand) -> None:
    """Whoever keeps an old descriptor can write to it for ever: another VM's part must not become readable so."""
    await made(directory, ROOT)
    await snapshot(directory, ROOT, "p1")
    await snapshot(directory, ROOT, "p2")
    (directory.root / "foreign").write_bytes(b"secret" * 1000)
    (directory.root / "p2").chmod(0o600)
    run(QEMU_IMG, "rebase", "-u", "-F", "raw", "-b", directory.root / "foreign", directory.root / "p2")
    for work in (
        prepared(directory, VM, ROOT),
        directory.volumes.create(OTHER, ROOT, directory.root / "p2"),
        directory.branches.stage(VM, ROOT, directory.root / "p2", None),
    ):
        assert "foreign" in (await refused(Code.CORRUPT, work)).message


async def test_a_volume_whose_header_was_changed_is_not_frozen(directory: DirectoryStand) -> None:
    volume = await made(directory, ROOT)
    secret = directory.home / "images" / "secret"
    secret.write_bytes(b"a" * MIB)
    run(QEMU_IMG, "rebase", "-u", "-F", "raw", "-b", secret, volume.path)
    await refused(Code.CORRUPT, directory.branches.freeze(VM, ROOT, "p1"))
    assert await directory.parts.present() == set()


async def test_a_part_without_its_record_is_nobodys_to_read(directory: DirectoryStand) -> None:
    await made(directory, ROOT)
    await snapshot(directory, ROOT, "p1")
    (directory.root / "p1.layer.json").unlink()
    error = await refused(Code.CORRUPT, prepared(directory, VM, ROOT))
    assert "p1.layer.json" in error.message


@pytest.mark.parametrize("part", ["", "..", "../x", "a/b", "x.layer.json"])
async def test_an_id_cannot_lead_out_of_the_directory(directory: DirectoryStand, part: str) -> None:
    await made(directory, ROOT)
    await refused(Code.INVALID, directory.branches.freeze(VM, ROOT, part))
    await refused(Code.INVALID, directory.branches.freeze("../x", ROOT, "p1"))
    await refused(Code.INVALID, directory.branches.take("a/b"))
