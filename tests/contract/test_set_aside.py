"""Files that may be damaged are kept aside as they are, and the disk goes on without them."""

from __future__ import annotations

import pytest

from tests.contract.test_branches import (
    OTHER,
    ROOT,
    VM,
    DirectoryStand,
    Stand,
    content,
    directory,
    made,
    prepared,
    snapshot,
    stand,
)

__all__ = ["directory", "stand"]  # fixtures


async def back_to(stand: Stand, part_id: str) -> None:
    for _ in range(2):  # all of it can be repeated
        await stand.branches.set_aside(VM, ROOT.name, "kept")
        await stand.branches.stage(VM, ROOT, stand.parts.path(part_id), None)
    await stand.branches.take(VM)
    await stand.branches.set_aside(VM, ROOT.name, "kept")


async def test_the_present_file_is_kept_and_the_disk_goes_on_over_another(stand: Stand) -> None:
    await made(stand, ROOT)
    await snapshot(stand, ROOT, "p1")
    stand.write(await prepared(stand, VM, ROOT), "b")
    await back_to(stand, "p1")
    assert stand.read(await prepared(stand, VM, ROOT)) == "a"
    assert await content(stand, "kept") == "ab"
    assert await stand.parts.present() == {"p1", "kept"}
    assert await stand.volumes.owners() == {VM}


async def test_a_disk_without_a_file_has_nothing_to_keep(stand: Stand) -> None:
    await stand.branches.set_aside(OTHER, ROOT.name, "kept")
    assert await stand.parts.present() == set()


@pytest.mark.parametrize("broken", ["header", "record", "no record"])
async def test_nothing_of_what_is_kept_need_be_readable(directory: DirectoryStand, broken: str) -> None:
    await made(directory, ROOT)
    await snapshot(directory, ROOT, "p1")
    volume = await prepared(directory, VM, ROOT)
    directory.write(volume, "b")
    about = volume.path.parent / f"{ROOT.name}.volume.json"
    if broken == "header":
        with volume.path.open("r+b") as file:
            file.write(b"\0" * 64)
    elif broken == "record":
        about.write_bytes(b"{")
    else:
        about.unlink()
    kept = volume.path.read_bytes()
    await back_to(directory, "p1")
    assert directory.read(await prepared(directory, VM, ROOT)) == "a"
    assert directory.parts.path("kept").read_bytes() == kept
    if broken == "record":
        assert (directory.root / "kept.layer.json").read_bytes() == b"{"
    await directory.parts.remove("kept")
    assert await directory.parts.present() == {"p1"}
