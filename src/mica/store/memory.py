"""A store that lives and dies with its process: for tests, simulations and throw-away daemons."""

from __future__ import annotations

import bisect
from types import TracebackType
from typing import Self

from mica.ports.store import ABSENT, Change, Compacted, Conflict, Key, Row, Transaction
from mica.store.transaction import check_transaction
from mica.store.waiters import Waiters, closed


class MemoryStore:
    """:class:`mica.ports.store.Store` in dictionaries. Every commit is as durable as the process."""

    def __init__(self) -> None:
        self._rows: dict[Key, Row] = {}
        self._ids: dict[str, list[str]] = {}
        self._commits: list[tuple[Change, ...]] = []
        self._revision = 0
        self._compacted = 0
        self._waiters = Waiters()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, key: Key) -> Row | None:
        self._check_open()
        return self._rows.get(key)

    async def scan(self, kind: str, *, after: str = "", limit: int | None = None) -> list[Row]:
        self._check_open()
        ids = self._ids.get(kind, [])
        first = bisect.bisect_right(ids, after)
        chosen = ids[first:] if limit is None else ids[first : first + limit]
        return [self._rows[Key(kind, id_)] for id_ in chosen]

    async def commit(self, transaction: Transaction, *, durable: bool = True) -> int:
        del durable  # nothing here outlives the process, so there is nothing to choose
        self._check_open()
        check_transaction(transaction)
        for key, expected in transaction.expect.items():
            row = self._rows.get(key)
            found = ABSENT if row is None else row.generation
            if found != expected:
                raise Conflict(key, expected, found)
        revision = self._revision + 1
        changes = []
        for key, value in transaction.put.items():
            self._write(key, value, revision)
            changes.append(Change(revision, key, value))
        changes += [Change(revision, key, None) for key in dict.fromkeys(transaction.delete) if self._erase(key)]
        if changes:
            self._revision = revision
            self._commits.append(tuple(changes))
            self._waiters.wake(revision)
        return self._revision

    async def revision(self) -> int:
        self._check_open()
        return self._revision

    async def changes(self, since: int, *, limit: int = 1000) -> list[Change]:
        self._check_open()
        if since < self._compacted:
            raise Compacted(self._compacted + 1)
        found: list[Change] = []
        # Revisions are consecutive, so the place of a commit follows from its revision.
        for at in range(since - self._compacted, len(self._commits)):
            if len(found) >= limit:
                break
            found.extend(self._commits[at])
        return found

    async def wait(self, since: int) -> int:
        self._check_open()
        return self._revision if self._revision > since else await self._waiters.wait(since)

    async def compact(self, keep: int) -> None:
        self._check_open()
        forgotten = max(len(self._commits) - max(keep, 0), 0)
        del self._commits[:forgotten]
        self._compacted += forgotten

    async def close(self) -> None:
        self._closed = True
        self._waiters.close()

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    def _write(self, key: Key, value: bytes, revision: int) -> None:
        if key not in self._rows:
            bisect.insort(self._ids.setdefault(key.kind, []), key.id)
        self._rows[key] = Row(key, value, revision)

    def _erase(self, key: Key) -> bool:
        if self._rows.pop(key, None) is None:
            return False
        ids = self._ids[key.kind]
        del ids[bisect.bisect_left(ids, key.id)]
        return True
