"""What only a store in a file has: restarts, kills, power cuts, full disks, and files that are not ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mica.model.errors import Code, MicaError
from mica.ports.store import Compacted, Conflict, Key, Transaction
from mica.store.schema import MIGRATIONS
from mica.store.sqlite import SqliteStore

A = Key("vm", "a")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "mica.db"


async def fill(path: Path, rows: int = 200, size: int = 2000) -> None:
    async with await SqliteStore.open(path) as store:
        await store.commit(Transaction(put={Key("vm", f"{n:05}"): bytes([n % 256]) * size for n in range(rows)}))


async def test_everything_is_there_after_a_restart(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        for n in range(10):
            await store.commit(Transaction(put={A: str(n).encode()}), durable=False)
        await store.commit(Transaction(delete=(A,)), durable=False)
        await store.compact(4)
        before = await store.changes(7)
    async with await SqliteStore.open(path) as store:
        assert await store.revision() == 11
        assert await store.get(A) is None
        assert await store.changes(7) == before
        with pytest.raises(Compacted):
            await store.changes(6)
        await store.compact(0)
    async with await SqliteStore.open(path) as store:
        assert await store.revision() == 11
        with pytest.raises(Conflict):
            await store.commit(Transaction(expect={A: 11}, put={A: b""}))
        assert await store.commit(Transaction(put={A: b""})) == 12


async def test_only_the_owner_may_read_the_file_and_closing_leaves_one_file(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        await store.commit(Transaction(put={A: b"secret"}))
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert [file.name for file in path.parent.iterdir()] == ["mica.db"]


async def test_closing_ends_the_thread(path: Path) -> None:
    before = threading.active_count()
    store = await SqliteStore.open(path)
    assert threading.active_count() == before + 1
    await store.close()
    assert threading.active_count() == before


async def test_a_database_of_a_newer_mica_is_refused_and_left_alone(path: Path) -> None:
    await fill(path)
    known = MIGRATIONS[-1].version
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO schema_version VALUES (?, 'from the future')", (known + 3,))
    content = path.read_bytes()
    with pytest.raises(MicaError) as caught:
        await SqliteStore.open(path)
    assert caught.value.code is Code.HOME_NEWER
    assert f"schema {known + 3}" in caught.value.message
    assert f"up to {known}" in caught.value.message
    assert "MICA_HOME" in caught.value.hint
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"not a database, but a letter " * 300, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(MicaError) as caught:
        await SqliteStore.open(path)
    assert caught.value.code is Code.CORRUPT
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert path.read_bytes() == content


async def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (url)")
    content = path.read_bytes()
    with pytest.raises(MicaError, match="bookmarks") as caught:
        await SqliteStore.open(path)
    assert caught.value.code is Code.CORRUPT
    assert path.read_bytes() == content


def overwrite(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * length)


async def test_damage_is_found_when_it_is_read(path: Path) -> None:
    await fill(path)
    overwrite(path, 8 * 4096, path.stat().st_size - 8 * 4096)
    async with await SqliteStore.open(path) as store:
        with pytest.raises(MicaError) as caught:
            await store.scan("vm")
        assert caught.value.code is Code.CORRUPT
        assert ".recover" in caught.value.hint


async def test_damage_is_found_at_once_when_the_last_daemon_was_killed(path: Path) -> None:
    await fill(path)
    overwrite(path, 8 * 4096, path.stat().st_size - 8 * 4096)
    path.with_name("mica.db-wal").write_bytes(b"unfinished")
    with pytest.raises(MicaError) as caught:
        await SqliteStore.open(path)
    assert caught.value.code is Code.CORRUPT


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "mica.db", tmp_path):
        with pytest.raises(MicaError) as caught:
            await SqliteStore.open(path)
        assert caught.value.code is Code.FORBIDDEN
        assert str(path) in caught.value.message


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Every file of this process is full at ``size`` bytes (EFBIG; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def assert_nothing_half_done(store: SqliteStore) -> None:
    assert await store.revision() == 1
    assert [row.value for row in await store.scan("vm")] == [b"first"]
    assert len(await store.changes(0)) == 1


BIG = Transaction(put={Key("vm", f"{n:05}"): b"x" * 4000 for n in range(300)}, delete=(A,))


async def test_a_write_that_fails_leaves_nothing_half_done(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        await store.commit(Transaction(put={A: b"first"}))
        with small_files(200_000), pytest.raises(MicaError) as caught:
            await store.commit(BIG)
        assert caught.value.code in (Code.INTERNAL, Code.INSUFFICIENT_DISK)
        assert str(path) in caught.value.message
        await assert_nothing_half_done(store)
        assert await store.commit(BIG) == 2


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_a_full_disk_leaves_nothing_half_done(path: Path) -> None:
    path.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path.parent)], check=True)
    try:
        async with await SqliteStore.open(path) as store:
            await store.commit(Transaction(put={A: b"first"}))
            with pytest.raises(MicaError) as caught:
                await store.commit(BIG)
            assert caught.value.code is Code.INSUFFICIENT_DISK
            assert caught.value.retryable
            await assert_nothing_half_done(store)
            subprocess.run(["mount", "-o", "remount,size=8m", str(path.parent)], check=True)
            assert await store.commit(BIG) == 2
    finally:
        subprocess.run(["umount", str(path.parent)], check=True)


async def test_reading_goes_on_while_a_commit_waits_for_another_process(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            commit = asyncio.create_task(store.commit(Transaction(put={A: b""})))
            assert await store.get(A) is None
            assert not commit.done()
            other.execute("ROLLBACK")
        assert await commit == 1


async def test_a_power_cut_takes_back_only_the_last_commits_in_order(path: Path, tmp_path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        await store.commit(Transaction(put={A: b"0", Key("vm", "b"): b"0"}))
        durable = path.with_name("mica.db-wal").stat().st_size
        for n in range(1, 40):
            value = str(n).encode()
            await store.commit(Transaction(put={A: value, Key("vm", "b"): value}), durable=False)
        log = path.with_name("mica.db-wal").read_bytes()
        database = path.read_bytes()
    seen = set()
    for length in [durable, *random.Random(7).sample(range(durable, len(log) + 1), 25), len(log)]:
        cut = tmp_path / f"cut-{length}" / "mica.db"
        cut.parent.mkdir()
        cut.write_bytes(database)
        cut.with_name("mica.db-wal").write_bytes(log[:length])
        async with await SqliteStore.open(cut) as store:
            revision = await store.revision()
            assert [row.value for row in await store.scan("vm")] == [str(revision - 1).encode()] * 2
            assert [change.revision for change in await store.changes(0)] == sorted([*range(1, revision + 1)] * 2)
        shutil.rmtree(cut.parent)
        seen.add(revision)
    assert min(seen) == 1
    assert max(seen) == 40


WRITER = """
import asyncio, os, sys
from pathlib import Path
from mica.ports.store import Key, Transaction
from mica.store.sqlite import SqliteStore

async def write(store, task):
    for n in range(1_000_000):
        id_ = f"{sys.argv[2]}-{task}-{n}"
        put = {Key(kind, id_): id_.encode() * 50 for kind in ("vm", "vm.status", "operation")}
        revision = await store.commit(Transaction(put=put), durable=task != 0)
        os.write(1, f"{id_} {revision}\\n".encode())

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    async with asyncio.TaskGroup() as group:
        for task in range(4):
            group.create_task(write(store, task))

asyncio.run(main())
"""


def killed_writer(path: Path, life: int, acknowledgements: int) -> list[tuple[str, int]]:
    """Let a process commit, kill it after so many acknowledgements, and return all that it gave."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(life)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(acknowledgements)]
        finally:
            process.kill()
        lines += process.stdout.readlines()
    assert process.returncode == -9
    return [(id_, int(revision)) for id_, revision in (line.decode().split() for line in lines if line.endswith(b"\n"))]


async def test_killing_the_writer_loses_no_acknowledged_commit(path: Path) -> None:
    acknowledged: list[tuple[str, int]] = []
    last = 0
    for life, acknowledgements in enumerate((1, 2, 7, 40, 300, 500)):
        acknowledged += await asyncio.to_thread(killed_writer, path, life, acknowledgements)
        async with await SqliteStore.open(path) as store:
            revision = await store.revision()
            assert revision >= max(given for _, given in acknowledged) > last
            last = revision
            rows = {
                kind: {row.key.id: row for row in await store.scan(kind)} for kind in ("vm", "vm.status", "operation")
            }
            for id_, given in acknowledged:
                for kind in rows:
                    assert rows[kind][id_].generation == given
                    assert rows[kind][id_].value == id_.encode() * 50
            # Whole commits only, also of those that nobody was told of.
            assert rows["vm"].keys() == rows["vm.status"].keys() == rows["operation"].keys()
            assert len(rows["vm"]) == revision
    assert len(acknowledged) >= 850
