"""The faulty store fails when told to, and only then."""

from __future__ import annotations

import pytest

from mica.model.errors import Code, MicaError
from mica.ports.store import Conflict, Key, Transaction
from mica.store.memory import MemoryStore
from mica.testing.store_faults import Crash, Fault, FaultyStore, When, conflict, disk_full, io_error

A = Key("vm", "a")


def put(value: bytes, key: Key = A) -> Transaction:
    return Transaction(put={key: value})


async def test_a_crash_before_a_commit_leaves_it_unwritten() -> None:
    store = FaultyStore(MemoryStore(), [Fault(at=2)])
    await store.commit(put(b"1"))
    with pytest.raises(Crash):
        await store.commit(put(b"2"))
    assert store.crashed
    assert store.commits == 2
    row = await store.inner.get(A)
    assert row is not None
    assert row.value == b"1"


async def test_a_crash_after_a_commit_leaves_it_written() -> None:
    store = FaultyStore(MemoryStore(), [Fault(at=1, when=When.AFTER)])
    with pytest.raises(Crash):
        await store.commit(put(b"1"))
    assert await store.inner.revision() == 1


async def test_a_dead_process_does_nothing_more() -> None:
    store = FaultyStore(MemoryStore(), [Fault(at=1)])
    with pytest.raises(Crash):
        await store.commit(put(b"1"))
    for call in (
        store.commit(put(b"2")),
        store.get(A),
        store.scan("vm"),
        store.revision(),
        store.changes(0),
        store.wait(0),
        store.compact(0),
    ):
        with pytest.raises(Crash):
            await call
    await store.close()
    assert await store.inner.revision() == 0, "the inner store stays open for the next life"


@pytest.mark.parametrize(
    ("error", "code"), [(io_error(), Code.INTERNAL), (disk_full(), Code.INSUFFICIENT_DISK), (conflict(), None)]
)
async def test_an_error_is_raised_once_and_life_goes_on(error: Exception, code: Code | None) -> None:
    store = FaultyStore(MemoryStore(), [Fault(at=1, error=error)])
    with pytest.raises((MicaError, Conflict)) as caught:
        await store.commit(put(b"1"))
    if isinstance(caught.value, MicaError):
        assert caught.value.code is code
    assert await store.commit(put(b"2")) == 1


async def test_only_the_commits_that_are_asked_for_are_counted() -> None:
    store = FaultyStore(MemoryStore(), [Fault(at=1)], counts=lambda transaction: A in transaction.put)
    await store.commit(put(b"x", Key("operation", "1")))
    assert store.commits == 0
    with pytest.raises(Crash):
        await store.commit(put(b"1"))


async def test_a_power_cut_keeps_what_was_durable_and_what_came_before_it() -> None:
    store = FaultyStore(MemoryStore())
    for n, durable in enumerate((False, True, False, False)):
        await store.commit(put(str(n).encode()), durable=durable)
    for survivors, value in ((0, b"1"), (1, b"2"), (2, b"3"), (9, b"3")):
        after = await store.after_power_cut(survivors=survivors)
        row = await after.get(A)
        assert row is not None
        assert row.value == value
