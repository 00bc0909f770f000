"""Random walks through every store, compared with a model that is too simple to be wrong: a list of commits."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mica.ports.store import Change, Compacted, Conflict, Key, Row, Store, Transaction
from mica.store.memory import MemoryStore
from mica.store.sqlite import SqliteStore

T = TypeVar("T")

KINDS = ("vm", "vm.status")
IDS = ("", "a", "b", "B", "é", "a\x00")
keys = st.builds(Key, st.sampled_from(KINDS), st.sampled_from(IDS))
values = st.binary(max_size=4)


class Walk(RuleBasedStateMachine):
    """``commits[n - 1]`` is what revision n changed."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.commits: list[list[Change]] = []
        self.compacted = 0
        self.open()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def open(self) -> None:
        self.store = MemoryStore()

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()

    def rows(self) -> dict[Key, Row]:
        rows: dict[Key, Row] = {}
        for change in (change for commit in self.commits for change in commit):
            if change.value is None:
                del rows[change.key]
            else:
                rows[change.key] = Row(change.key, change.value, change.revision)
        return rows

    @rule(
        put=st.dictionaries(keys, values, max_size=3),
        delete=st.lists(keys, max_size=3),
        expect=st.dictionaries(keys, st.none() | st.integers(0, 6), max_size=2),
        durable=st.booleans(),
    )
    def commit(self, put: dict[Key, bytes], delete: list[Key], expect: dict[Key, int | None], durable: bool) -> None:
        rows = self.rows()
        present = {key: rows[key].generation if key in rows else 0 for key in [*expect, *put, *delete]}
        # None stands for the right generation, so that most commits succeed.
        wanted = {key: present[key] if generation is None else generation for key, generation in expect.items()}
        transaction = Transaction(wanted, put, tuple(key for key in delete if key not in put))
        wrong = [key for key, generation in wanted.items() if present[key] != generation]
        if wrong:
            with pytest.raises(Conflict) as caught:
                self.run(self.store.commit(transaction, durable=durable))
            assert caught.value.key == wrong[0]
            assert caught.value.found == present[wrong[0]]
            return
        revision = len(self.commits) + 1
        changed = [Change(revision, key, value) for key, value in put.items()]
        changed += [Change(revision, key, None) for key in dict.fromkeys(transaction.delete) if present[key]]
        if changed:
            self.commits.append(changed)
        assert self.run(self.store.commit(transaction, durable=durable)) == len(self.commits)

    @rule(keep=st.integers(0, 8))
    def compact(self, keep: int) -> None:
        self.run(self.store.compact(keep))
        self.compacted = max(self.compacted, len(self.commits) - keep)

    @rule(since=st.integers(0, 12), limit=st.integers(1, 6))
    def changes(self, since: int, limit: int) -> None:
        if since < self.compacted:
            with pytest.raises(Compacted) as caught:
                self.run(self.store.changes(since, limit=limit))
            assert caught.value.oldest == self.compacted + 1
            return
        expected: list[Change] = []
        for commit in self.commits[since:]:
            if len(expected) < limit:
                expected += commit
        assert self.run(self.store.changes(since, limit=limit)) == expected

    @rule(kind=st.sampled_from(KINDS), after=st.sampled_from(IDS), limit=st.none() | st.integers(0, 4))
    def scan(self, kind: str, after: str, limit: int | None) -> None:
        rows = sorted((row for row in self.rows().values() if row.key.kind == kind), key=lambda row: row.key.id)
        expected = [row for row in rows if row.key.id > after][:limit]
        assert self.run(self.store.scan(kind, after=after, limit=limit)) == expected

    @precondition(lambda self: self.commits)
    @rule()
    def wait(self) -> None:
        assert self.run(self.store.wait(len(self.commits) - 1)) == len(self.commits)

    @invariant()
    def rows_agree(self) -> None:
        rows = self.rows()
        for key in (Key(kind, id_) for kind in KINDS for id_ in IDS):
            assert self.run(self.store.get(key)) == rows.get(key)
        assert self.run(self.store.revision()) == len(self.commits)


class SqliteWalk(Walk):
    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mica-store-"))
        super().__init__()

    def open(self) -> None:
        self.store = self.run(SqliteStore.open(self.directory / "mica.db"))

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.open()

    @rule()
    def restart_as_after_a_kill(self) -> None:
        """The files as they lie there while the store is open are all that the next process gets."""
        for file in sorted(self.directory.glob("mica.db*")):
            if not file.name.endswith("-shm"):
                shutil.copyfile(file, self.directory / file.name.replace("mica", "next"))
        self.run(self.store.close())
        for file in self.directory.glob("mica.db*"):
            file.unlink()
        for file in self.directory.glob("next.db*"):
            file.rename(file.with_name(file.name.replace("next", "mica")))
        self.open()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.directory)


# Long walks matter more than many of them; the time of one depends on the machine and proves nothing.
_settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMemoryWalk = Walk.TestCase
TestMemoryWalk.settings = _settings
TestSqliteWalk = SqliteWalk.TestCase
TestSqliteWalk.settings = _settings
