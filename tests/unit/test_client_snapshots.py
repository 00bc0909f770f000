"""Snapshots and forks from Python, against a daemon's API over a UNIX socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from mica import Client, MicaError
from mica.client.vms import make_create
from mica.model.errors import Code
from mica.model.operation import Operation, OperationState
from mica.model.snapshot import SnapshotKind
from mica.model.views import SnapshotCreate, SnapshotSet, VmFork
from mica.model.vm import VmState
from tests.unit.client_fixtures import Served, served

replace = msgspec.structs.replace


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
async def client(api: Served) -> AsyncIterator[Client]:
    async with Client(api.url) as c:
        await c.vms.create(make_create("", name="web", start=True))
        yield c


async def test_a_vm_goes_back_to_a_moment(client: Client) -> None:
    vm = await client.vms.get("web")
    clean = await vm.snapshot("clean", description="as installed")
    assert (clean.snapshot.name, clean.memory, clean.complete, clean.current) == ("clean", True, True, True)
    await vm.stop()
    assert not (await vm.snapshot("disks", memory=False)).memory
    assert (await vm.restore_snapshot("clean")).state is VmState.RUNNING
    assert vm.view.snapshot == clean.snapshot.id
    assert [v.snapshot.name for v in await vm.snapshots()] == ["clean", "disks", "before-restore-2"]
    assert (await vm.restore_snapshot("disks", keep=False)).state is VmState.STOPPED
    assert len(await vm.snapshots()) == 3


async def test_every_verb_on_a_snapshot(client: Client) -> None:
    taken = await client.snapshots.create("web", SnapshotCreate(name="clean"), wait=False)
    assert taken.verb == "snapshot.create"
    await client.snapshots.set("web", "clean", SnapshotSet(name="fresh", protected=True))
    with pytest.raises(MicaError) as caught:
        await client.snapshots.delete("web", "fresh")
    assert caught.value.code is Code.PROTECTED
    await client.snapshots.set("web", "fresh", SnapshotSet(protected=False))
    seen: list[Operation] = []
    assert (await client.snapshots.verify("web", "fresh", on_progress=seen.append)).result["damaged"] == {}
    assert seen
    await client.snapshots.delete("web", "fresh")
    assert await client.snapshots.list() == []


async def test_verifying_a_damaged_one_raises_what_was_found(api: Served, client: Client) -> None:
    vm = await client.vms.get("web")
    id_ = (await vm.snapshot("clean")).snapshot.id
    api.engine.shelf[id_] = replace(api.engine.shelf[id_], damaged=("ram: another checksum",))
    with pytest.raises(MicaError, match="snapshot clean of web is damaged: ram: another checksum") as caught:
        await client.snapshots.verify("web", "clean")
    assert caught.value.code is Code.CORRUPT
    assert (await client.snapshots.verify("web", "clean", wait=False)).state is OperationState.SUCCEEDED


async def test_copies_run_when_they_are_returned(client: Client) -> None:
    vm = await client.vms.get("web")
    copies = await vm.fork(3, name="w")
    assert [(copy.name, copy.state, copy.view.forked_from) for copy in copies] == [
        (f"w-{n}", VmState.RUNNING, "web") for n in (1, 2, 3)
    ]
    assert await client.snapshots.list() == []
    (moment,) = await client.snapshots.list(forks=True)
    assert moment.snapshot.kind is SnapshotKind.FORK
    await vm.snapshot("clean")
    (copy,) = await vm.fork(snapshot="clean")
    clean = await client.snapshots.get("web", "clean")
    assert (copy.view.snapshot, clean.forks) == (clean.snapshot.id, (copy.name,))


async def test_a_copy_that_fails_is_raised_and_those_that_run_are_named(client: Client) -> None:
    await client.vms.create(make_create("", name="barren", start=True))
    vm = await client.vms.get("barren")
    with pytest.raises(MicaError) as caught:
        await vm.fork(2)
    assert caught.value.code is Code.INSUFFICIENT_MEMORY
    assert caught.value.details["running"] == []


async def test_what_kept_the_moment_from_being_taken_is_the_reason(api: Served, client: Client) -> None:
    await client.vms.create(make_create("", name="barren", start=True))
    accepted = await client.snapshots.fork("barren", VmFork(count=2))
    assert accepted.freeze is not None
    frozen = api.engine.jobs[accepted.freeze.id]
    api.call(api.engine._job(replace(frozen, state=OperationState.CANCELLED)))
    with pytest.raises(MicaError) as caught:
        await client.snapshots.forked(accepted)
    assert caught.value.code is Code.CANCELLED
