"""Layers that are merged read as before, for whoever lies over them, and leave what is below as it was."""

from __future__ import annotations

import msgspec
import pytest

from mica.model.errors import Code
from mica.model.image import DiskFormat
from mica.model.units import MIB, Bytes
from mica.model.vm import DiskSpec
from mica.ports.volumes import Volume
from mica.storage.chain import MAX_CHAIN
from tests.contract.test_branches import (
    DATA,
    OTHER,
    ROOT,
    TOKENS,
    VM,
    DirectoryStand,
    Stand,
    content,
    directory,
    made,
    prepared,
    refused,
    snapshot,
    stand,
)

__all__ = ["directory", "stand"]  # fixtures


async def chain(stand: Stand, disk: DiskSpec, parts: int) -> Volume:
    """Parts p1, p2 …, each with a word of its own, below the present file with one more."""
    volume = await made(stand, disk, TOKENS[0])
    for number in range(1, parts + 1):
        await snapshot(stand, disk, f"p{number}")
        volume = await prepared(stand, VM, disk)
        stand.write(volume, TOKENS[number])
    return volume


async def merged(stand: Stand, part: str, below: int) -> None:
    seal = await stand.branches.merge(part, below)
    for _ in range(2):
        await stand.branches.put_merged(part)
    await stand.branches.drop_merged(part)
    await stand.parts.verify(part, seal.digest, lambda _: None)


@pytest.mark.parametrize("disk", [ROOT, DATA], ids=["qcow2", "raw"])
@pytest.mark.parametrize(("upper", "below"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3)])
async def test_what_lies_over_merged_layers_reads_as_before(
    stand: Stand, disk: DiskSpec, upper: int, below: int
) -> None:
    volume = await chain(stand, disk, 4)
    await merged(stand, f"p{upper}", below)
    for number in range(upper - below, upper):
        await stand.parts.remove(f"p{number}")
    present = await prepared(stand, VM, disk)
    assert present.path == volume.path
    assert stand.read(present) == TOKENS[:5]
    assert len(present.backing) == 4 - below
    rest = [n for n in range(1, 5) if not upper - below <= n < upper]
    for number in rest:
        assert await content(stand, f"p{number}", disk) == TOKENS[:number]
    await snapshot(stand, disk, "next")
    assert await content(stand, "next", disk) == TOKENS[:5]


async def test_merging_begins_anew_and_is_given_up(stand: Stand) -> None:
    await chain(stand, ROOT, 3)
    first = await stand.branches.merge("p3", 2)
    assert await stand.branches.merge("p3", 2) == first
    await stand.branches.drop_merged("p3")
    await stand.branches.put_merged("p3")  # there is nothing to put
    assert await stand.parts.present() == {"p1", "p2", "p3"}
    assert stand.read(await prepared(stand, VM, ROOT)) == TOKENS[:4]
    await refused(Code.INVALID, stand.branches.merge("p3", 7))


async def test_a_chain_that_is_merged_can_grow_again(stand: Stand) -> None:
    await made(stand, ROOT, TOKENS[0])
    for number in range(1, MAX_CHAIN):
        await snapshot(stand, ROOT, f"p{number}")
    await stand.branches.freeze(VM, ROOT, "more")
    error = await refused(Code.STATE_CONFLICT, stand.branches.stage(VM, ROOT, stand.parts.path("more"), None))
    assert str(MAX_CHAIN - 1) in error.message
    await merged(stand, f"p{MAX_CHAIN - 1}", MAX_CHAIN - 2)
    await stand.branches.stage(VM, ROOT, stand.parts.path("more"), None)
    await stand.branches.take(VM)
    assert stand.read(await prepared(stand, VM, ROOT)) == TOKENS[0]


async def test_a_disk_that_grew_in_between(directory: DirectoryStand) -> None:
    await chain(directory, ROOT, 1)
    larger = msgspec.structs.replace(ROOT, size=Bytes(ROOT.size + MIB))
    directory.write(await prepared(directory, VM, larger), "c")
    for part in ("p2", "p3"):
        await snapshot(directory, larger, part)
    await merged(directory, "p3", 2)
    assert directory.read(await prepared(directory, VM, larger)) == "abc"
    assert (await prepared(directory, VM, larger)).size == larger.size


async def test_what_has_the_layers_open_reads_on(directory: DirectoryStand) -> None:
    await chain(directory, ROOT, 3)
    old = {n: directory.parts.path(f"p{n}").open("rb") for n in (2, 3)}
    before = {n: file.read() for n, file in old.items()}
    await merged(directory, "p3", 1)
    await directory.parts.remove("p2")
    for n, file in old.items():
        file.seek(0)
        assert file.read() == before[n]
        file.close()


async def test_another_vm_over_the_same_layer_reads_on(stand: Stand) -> None:
    await chain(stand, ROOT, 3)
    wish = msgspec.structs.replace(ROOT, format=DiskFormat.QCOW2)
    other = await stand.volumes.create(OTHER, wish, stand.parts.path("p3"))
    stand.write(other, "e")
    await merged(stand, "p3", 2)
    for part in ("p1", "p2"):
        await stand.parts.remove(part)
    assert stand.read((await stand.volumes.prepare(OTHER, (wish,), None))[0]) == "abce"
    await stand.volumes.remove(OTHER)
