"""One suite for every store: what the engine relies on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mica.model.errors import Code, MicaError
from mica.ports.store import ABSENT, Change, Compacted, Conflict, Key, Row, Store, Transaction
from mica.store.memory import MemoryStore
from mica.store.sqlite import SqliteStore
from mica.testing.store_faults import FaultyStore

A, B, C = Key("vm", "a"), Key("vm", "b"), Key("vm", "c")


@pytest.fixture(params=["memory", "sqlite", "faulty-memory", "faulty-sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store = MemoryStore() if "memory" in request.param else await SqliteStore.open(tmp_path / "mica.db")
    if "faulty" in request.param:
        made = FaultyStore(made)
    try:
        yield made
    finally:
        await made.close()


async def put(store: Store, *pairs: tuple[Key, bytes], durable: bool = False) -> int:
    return await store.commit(Transaction(put=dict(pairs)), durable=durable)


async def test_an_empty_store_has_revision_0_and_nothing_in_it(store: Store) -> None:
    assert await store.revision() == 0
    assert await store.get(A) is None
    assert await store.scan("vm") == []
    assert await store.changes(0) == []


@pytest.mark.parametrize("durable", [True, False])
async def test_a_row_is_read_back_with_the_revision_that_wrote_it(store: Store, durable: bool) -> None:
    first = await put(store, (A, b"one"), durable=durable)
    second = await put(store, (A, b"two"), (B, b"\x00\xff"), durable=durable)
    assert (first, second) == (1, 2)
    assert await store.get(A) == Row(A, b"two", second)
    assert await store.get(B) == Row(B, b"\x00\xff", second)
    assert await store.revision() == second


async def test_kinds_are_apart(store: Store) -> None:
    await put(store, (Key("vm", "x"), b"vm"), (Key("image", "x"), b"image"))
    assert [row.value for row in await store.scan("vm")] == [b"vm"]
    assert [row.value for row in await store.scan("image")] == [b"image"]


async def test_a_commit_holds_when_every_expected_generation_does(store: Store) -> None:
    generation = await store.commit(Transaction(expect={A: ABSENT}, put={A: b"1"}))
    after = await store.commit(Transaction(expect={A: generation, B: ABSENT}, put={A: b"2"}))
    assert await store.get(A) == Row(A, b"2", after)


@pytest.mark.parametrize("expected", [0, 1, 3, 99])
async def test_a_conflict_names_the_row_and_writes_nothing(store: Store, expected: int) -> None:
    await put(store, (A, b"1"))
    await put(store, (A, b"2"), (B, b"2"))
    with pytest.raises(Conflict) as caught:
        await store.commit(
            Transaction(expect={B: 2, A: expected, C: 77}, put={A: b"x", C: b"x"}, delete=(B,)),
        )
    assert (caught.value.key, caught.value.expected, caught.value.found) == (A, expected, 2)
    assert await store.revision() == 2
    assert [row.value for row in await store.scan("vm")] == [b"2", b"2"]
    assert len(await store.changes(0)) == 3


async def test_absent_is_what_a_row_that_was_never_there_and_a_deleted_one_have(store: Store) -> None:
    with pytest.raises(Conflict) as caught:
        await store.commit(Transaction(expect={A: 5}, put={A: b""}))
    assert caught.value.found == ABSENT
    await put(store, (A, b"1"))
    with pytest.raises(Conflict):
        await store.commit(Transaction(expect={A: ABSENT}, put={A: b"2"}))
    await store.commit(Transaction(expect={A: 1}, delete=(A,)))
    assert await store.get(A) is None
    assert await store.commit(Transaction(expect={A: ABSENT}, put={A: b"3"})) == 3


async def test_expecting_alone_writes_nothing_and_tells_the_revision(store: Store) -> None:
    await put(store, (A, b"1"))
    assert await store.commit(Transaction(expect={A: 1})) == 1
    assert await store.commit(Transaction()) == 1
    assert len(await store.changes(0)) == 1


async def test_deleting_what_is_absent_is_no_error_and_no_change(store: Store) -> None:
    await put(store, (A, b"1"))
    assert await store.commit(Transaction(delete=(B,))) == 1
    assert await store.commit(Transaction(delete=(A, B, A))) == 2
    assert (await store.changes(1)) == [Change(2, A, None)]


async def test_a_transaction_that_contradicts_itself_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="puts and deletes"):
        await store.commit(Transaction(put={A: b""}, delete=(A,)))
    assert await store.revision() == 0


async def test_an_empty_value_is_a_value(store: Store) -> None:
    await put(store, (A, b""))
    assert await store.get(A) == Row(A, b"", 1)
    assert await store.changes(0) == [Change(1, A, b"")]


async def test_scanning_pages_through_ids_in_order(store: Store) -> None:
    ids = ["b", "a", "B", "ä", "𝄞", "a\x00", "aa", "9", "10", "-"]
    await put(store, *((Key("vm", id_), id_.encode()) for id_ in ids))
    await put(store, (Key("vm.status", "c"), b"another kind"))
    found: list[str] = []
    while page := await store.scan("vm", after=found[-1] if found else "", limit=3):
        assert len(page) <= 3
        found += [row.key.id for row in page]
    assert found == sorted(ids)
    assert [row.key.id for row in await store.scan("vm")] == sorted(ids)
    assert await store.scan("vm", limit=0) == []
    assert [row.key.id for row in await store.scan("vm", after="a", limit=1)] == ["a\x00"]
    assert [row.key.id for row in await store.scan("vm", after="a\x00\x00", limit=1)] == ["aa"]


async def test_a_long_list_is_whole_and_of_one_moment(store: Store) -> None:
    keys = [Key("vm", f"{n:05}") for n in range(1500)]
    await put(store, *((key, b"0") for key in keys))

    async def rewrite() -> None:
        for turn in range(1, 6):
            await put(store, *((key, str(turn).encode()) for key in keys))

    async with asyncio.TaskGroup() as group:
        group.create_task(rewrite())
        for _ in range(10):
            rows = await store.scan("vm")
            assert [row.key for row in rows] == keys
            assert len({row.generation for row in rows}) == 1


async def test_changes_come_oldest_first_in_whole_commits(store: Store) -> None:
    await put(store, (A, b"1"), (B, b"1"))
    await store.commit(Transaction(put={C: b"2"}, delete=(A,)))
    await put(store, (B, b"3"))
    everything = [
        Change(1, A, b"1"),
        Change(1, B, b"1"),
        Change(2, C, b"2"),
        Change(2, A, None),
        Change(3, B, b"3"),
    ]
    assert await store.changes(0) == everything
    assert await store.changes(0, limit=1) == everything[:2]
    assert await store.changes(0, limit=2) == everything[:2]
    assert await store.changes(0, limit=3) == everything[:4]
    assert await store.changes(1, limit=1) == everything[2:4]
    assert await store.changes(2) == everything[4:]
    assert await store.changes(3) == []
    assert await store.changes(1000) == []
    assert await store.changes(0, limit=0) == []


async def test_what_changed_tells_exactly_what_is(store: Store) -> None:
    for n in range(40):
        key = Key("vm", str(n % 7))
        await store.commit(Transaction(put={key: str(n).encode()}) if n % 5 else Transaction(delete=(key,)))
    seen: dict[Key, bytes] = {}
    since = 0
    while page := await store.changes(since, limit=4):
        for change in page:
            if change.value is None:
                del seen[change.key]
            else:
                seen[change.key] = change.value
        since = page[-1].revision
    assert seen == {row.key: row.value for row in await store.scan("vm")}


async def test_compaction_forgets_changes_and_keeps_rows_and_revisions(store: Store) -> None:
    for n in range(20):
        await put(store, (A, str(n).encode()))
    await store.compact(5)
    for since in (0, 14):
        with pytest.raises(Compacted) as caught:
            await store.changes(since)
        assert caught.value.oldest == 16
    assert [change.revision for change in await store.changes(15)] == [16, 17, 18, 19, 20]
    await store.compact(1000)
    assert len(await store.changes(15)) == 5
    await store.compact(0)
    with pytest.raises(Compacted) as caught:
        await store.changes(19)
    assert caught.value.oldest == 21
    assert await store.changes(20) == []
    assert await store.get(A) == Row(A, b"19", 20)
    assert await store.revision() == 20
    assert await put(store, (A, b"20")) == 21
    assert await store.changes(20) == [Change(21, A, b"20")]


async def test_compaction_of_a_long_log(store: Store) -> None:
    for n in range(1300):
        await put(store, (A, str(n).encode()))
    await store.compact(10)
    with pytest.raises(Compacted):
        await store.changes(1289)
    assert len(await store.changes(1290)) == 10


async def test_waiting_ends_with_the_commit_that_is_waited_for(store: Store) -> None:
    async with asyncio.timeout(10):
        await put(store, (A, b"1"))
        assert await store.wait(0) == 1
        waiters = [asyncio.create_task(store.wait(since)) for since in (1, 1, 2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiters)
        await put(store, (A, b"2"))
        assert await waiters[0] == 2
        assert await waiters[1] == 2
        await asyncio.sleep(0)
        assert not waiters[2].done()
        await put(store, (A, b"3"))
        assert await waiters[2] == 3


async def test_a_commit_that_writes_nothing_wakes_nobody(store: Store) -> None:
    waiter = asyncio.create_task(store.wait(0))
    await asyncio.sleep(0)
    await store.commit(Transaction(expect={A: ABSENT}))
    with pytest.raises(Conflict):
        await store.commit(Transaction(expect={A: 1}, put={A: b""}))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiter.done()
    waiter.cancel()
    await asyncio.wait([waiter])


async def test_waiting_can_be_cancelled(store: Store) -> None:
    async with asyncio.timeout(10):
        gone = asyncio.create_task(store.wait(0))
        stays = asyncio.create_task(store.wait(0))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        await put(store, (A, b"1"))
        assert await stays == 1


async def test_commits_at_the_same_time_get_one_revision_each(store: Store) -> None:
    revisions = await asyncio.gather(*(put(store, (Key("vm", str(n)), b"x")) for n in range(200)))
    assert sorted(revisions) == list(range(1, 201))
    for n, revision in enumerate(revisions):
        row = await store.get(Key("vm", str(n)))
        assert row is not None
        assert row.generation == revision


async def test_of_many_who_expect_the_same_one_wins(store: Store) -> None:
    async def grab(n: int) -> int | None:
        try:
            return await store.commit(Transaction(expect={A: ABSENT}, put={A: str(n).encode()}))
        except Conflict:
            return None

    won = [revision for revision in await asyncio.gather(*(grab(n) for n in range(50))) if revision is not None]
    assert won == [1]


async def test_counting_by_compare_and_swap_loses_nothing(store: Store) -> None:
    await put(store, (A, b"0"))

    async def add() -> None:
        for _ in range(10):
            while True:
                row = await store.get(A)
                assert row is not None
                try:
                    await store.commit(
                        Transaction(expect={A: row.generation}, put={A: str(int(row.value) + 1).encode()}),
                        durable=False,
                    )
                    break
                except Conflict:
                    await asyncio.sleep(0)

    await asyncio.gather(*(add() for _ in range(8)))
    row = await store.get(A)
    assert row is not None
    assert row.value == b"80"


async def test_a_cancelled_commit_has_been_written_or_never_will_be(store: Store) -> None:
    for n in range(30):
        key = Key("vm", str(n))
        task = asyncio.create_task(put(store, (key, b"x")))
        for _ in range(n % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        before = await store.get(key)
        await put(store, (A, b"barrier"))
        assert await store.get(key) == before


async def test_a_closed_store_says_so(store: Store) -> None:
    waiter = asyncio.create_task(store.wait(0))
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    for call in (
        store.get(A),
        store.scan("vm"),
        store.revision(),
        store.changes(0),
        store.wait(0),
        store.compact(1),
        store.commit(Transaction()),
        waiter,
    ):
        with pytest.raises(MicaError) as caught:
            await call
        assert caught.value.code is Code.BUSY
        assert caught.value.retryable


async def test_closing_finishes_what_was_asked_for(store: Store) -> None:
    commits = [asyncio.create_task(put(store, (Key("vm", str(n)), b"x"))) for n in range(50)]
    await asyncio.sleep(0)
    await store.close()
    assert sorted(await asyncio.gather(*commits)) == list(range(1, 51))
