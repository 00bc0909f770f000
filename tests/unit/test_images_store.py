"""The content store: images appear whole or not at all, and what was damaged is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mica.images.directory import DirectoryImages
from mica.images.files import disk_full_is_said
from mica.images.store import MANIFEST, ContentStore, Draft, Facts
from mica.model.errors import Code, MicaError
from mica.model.image import DirectBoot, Image
from mica.model.units import Bytes
from mica.ports.progress import no_progress

FACTS = Facts(
    os="Test",
    direct_boot=DirectBoot(kernel="vmlinuz", initrd="initrd", cmdline="quiet"),
    min_memory=Bytes(1 << 27),
    build={"by": "a test"},
)


def fill(draft: Draft, initrd: bytes = b"initrd" * 1000) -> None:
    draft.file("vmlinuz").write_bytes(b"kernel")
    draft.file("initrd").write_bytes(initrd)
    (draft.scratch / "rubbish").write_text("of a build")
    draft.facts = FACTS


async def land(store: ContentStore, name: str = "test", initrd: bytes = b"initrd" * 1000) -> Image:
    async with store.draft() as draft:
        fill(draft, initrd)
        return await store.land(draft, name, no_progress)


def work(root: Path) -> list[Path]:
    return sorted((root / ".work").iterdir()) if (root / ".work").exists() else []


@asynccontextmanager
async def other_process(code: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_an_image_lands_complete_and_read_only(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "images")
    image = await land(store)
    home = store.directory(image.digest)
    assert sorted(path.name for path in home.iterdir()) == ["initrd", MANIFEST, "vmlinuz"]
    assert {oct(path.stat().st_mode & 0o777) for path in home.iterdir()} == {"0o444"}
    assert await store.images() == [image]
    assert image.size == 6 + 6000
    assert work(tmp_path / "images") == []
    await store.verify(image, no_progress)


async def test_the_same_content_is_the_same_image_whatever_its_name(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    first, second = await land(store, "one"), await land(store, "two")
    assert first.digest == second.digest
    assert [image.name for image in await store.images()] == ["two"]
    assert (await land(store, "one", b"different")).digest != first.digest


async def test_what_a_machine_must_know_is_part_of_the_digest(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    first = await land(store)
    async with store.draft() as draft:
        fill(draft)
        draft.facts = Facts(os="Test", min_memory=Bytes(1 << 28))
        second = await store.land(draft, "test", no_progress)
    assert first.digest != second.digest


async def test_making_it_again_repairs_a_damaged_image(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    image = await land(store)
    path = store.directory(image.digest) / "initrd"
    path.chmod(0o644)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(MicaError, match="damaged"):
        await store.verify(image, no_progress)
    await store.verify(await land(store), no_progress)


@pytest.mark.parametrize("offset", [0, 3000, 5999])
async def test_one_changed_byte_is_found_and_named(tmp_path: Path, offset: int) -> None:
    store = ContentStore(tmp_path)
    image = await land(store)
    path = store.directory(image.digest) / "initrd"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(MicaError) as caught:
        await store.verify(image, no_progress)
    assert caught.value.code is Code.CORRUPT
    assert str(path) in caught.value.message
    assert image.files["initrd"].blake3 in caught.value.message


async def test_a_changed_manifest_is_found(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    image = await land(store)
    boot = DirectBoot(kernel="vmlinuz", initrd="initrd", cmdline="quiet init=/bin/evil")
    fields = {name: getattr(image, name) for name in image.__struct_fields__}
    with pytest.raises(MicaError) as caught:
        await store.verify(Image(**{**fields, "direct_boot": boot}), no_progress)
    assert caught.value.code is Code.CORRUPT


async def test_a_missing_file_is_not_listed_and_not_found(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    image = await land(store)
    (store.directory(image.digest) / "vmlinuz").unlink()
    assert await store.images() == []
    with pytest.raises(MicaError) as caught:
        await store.verify(image, no_progress)
    assert caught.value.code is Code.NOT_FOUND


async def test_progress_of_verify_ends_at_one(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    image = await land(store, initrd=bytes(3 << 20))
    seen: list[float | None] = []
    await store.verify(image, lambda fraction, text: seen.append(fraction))
    await asyncio.sleep(0)
    assert seen == sorted(seen, key=lambda fraction: fraction or 0)
    assert seen[-1] == 1.0


async def test_strangers_in_the_directory_are_no_images(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    image = await land(store)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ("0" * 64)).mkdir()
    (tmp_path / ("1" * 64)).mkdir()
    (tmp_path / ("1" * 64) / MANIFEST).write_text("{}")
    copied = tmp_path / ("2" * 64)
    copied.mkdir()
    (copied / MANIFEST).write_bytes((store.directory(image.digest) / MANIFEST).read_bytes())
    assert await store.images() == [image]
    await store.sweep()
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("digest", ["", "blake3:", "blake3:../../etc", "sha256:" + "0" * 64, "blake3:" + "G" * 64])
async def test_what_is_no_digest_is_never_a_path(tmp_path: Path, digest: str) -> None:
    store = ContentStore(tmp_path)
    with pytest.raises(MicaError) as caught:
        await store.remove(digest)
    assert caught.value.code is Code.NOT_FOUND


async def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    image = await land(store)
    await store.remove(image.digest)
    await store.remove(image.digest)
    assert await store.images() == []
    assert not store.directory(image.digest).exists()
    assert work(tmp_path) == []


async def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)

    async def build() -> None:
        async with store.draft() as draft:
            fill(draft)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await build()
    assert work(tmp_path) == []
    assert await store.images() == []


async def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    begun = asyncio.Event()

    async def build() -> None:
        async with store.draft() as draft:
            fill(draft)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(build())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work(tmp_path) == []


DIE_IN_A_BUILD = """
import asyncio, os, sys
from pathlib import Path
from mica.images.store import ContentStore
async def main():
    async with ContentStore(Path(sys.argv[1])).draft() as draft:
        draft.file("disk").write_bytes(bytes(1 << 20))
        print("building", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""


async def test_what_a_killed_build_left_is_removed_but_not_a_living_one(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    async with other_process(DIE_IN_A_BUILD, str(tmp_path)) as builder:
        assert builder.stdout is not None
        assert await builder.stdout.readline() == b"building\n"
        assert await store.sweep() == []
        assert len(work(tmp_path)) == 1
        builder.kill()
        await builder.wait()
        assert len(await store.sweep()) == 1
    assert work(tmp_path) == []


async def test_present_sweeps_first(tmp_path: Path) -> None:
    images = DirectoryImages(tmp_path / "images")
    left = tmp_path / "images" / ".work" / "dead" / "files"
    left.mkdir(parents=True)
    (left / "disk.qcow2").write_bytes(b"half")
    assert await images.present() == []
    assert work(tmp_path / "images") == []


LAND = """
import asyncio, sys
from pathlib import Path
from mica.images.store import ContentStore, Facts
from mica.ports.progress import no_progress
async def main():
    store = ContentStore(Path(sys.argv[1]))
    for number in range(10):
        async with store.draft() as draft:
            draft.file("disk").write_bytes(b"content" * 1000)
            draft.facts = Facts(os="Test")
            print((await store.land(draft, sys.argv[2], no_progress)).digest, flush=True)
        await store.images()
asyncio.run(main())
"""


async def test_two_processes_may_build_the_same_at_once(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    async with other_process(LAND, str(tmp_path), "a") as one, other_process(LAND, str(tmp_path), "b") as two:
        outputs = await asyncio.gather(one.communicate(), two.communicate())
        assert (one.returncode, two.returncode) == (0, 0)
    digests = {line for out, _ in outputs for line in out.decode().split()}
    (image,) = await store.images()
    assert digests == {image.digest}
    await store.verify(image, no_progress)
    assert work(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
async def test_a_disk_that_fills_up_in_a_build_is_said_and_nothing_stays(small_disk: Path) -> None:
    store = ContentStore(small_disk / "images")
    kept = await land(store)

    async def build() -> None:
        async with store.draft() as draft:
            with disk_full_is_said(small_disk, "building the image big"):
                draft.file("disk").write_bytes(bytes(8 << 20))

    with pytest.raises(MicaError) as caught:
        await build()
    assert caught.value.code is Code.INSUFFICIENT_DISK
    assert "free in" in caught.value.message
    assert work(small_disk / "images") == []
    assert await store.images() == [kept]
    await store.verify(kept, no_progress)
