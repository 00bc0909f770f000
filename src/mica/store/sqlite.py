"""The default store: one SQLite database in write-ahead mode.

All writing is done by one thread with a connection of its own, because a durable commit waits for the disk. Reading is
done where it is asked for: a row takes microseconds, less than handing it to a thread. Long lists are read in batches
from one snapshot, and the event loop runs in between.

Source of what is relied on: https://sqlite.org/wal.html (readers never block, ``synchronous`` FULL syncs the log at
every commit, NORMAL only before it is copied back, so that a power cut may take back the last commits, in order).
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mica.ports.store import ABSENT, Change, Compacted, Conflict, Key, Row, Transaction
from mica.store.schema import connect, open_database, translated
from mica.store.transaction import check_transaction
from mica.store.waiters import Waiters, closed
from mica.store.writer import Writer

# Rows that are read at one go: well below a millisecond.
BATCH: Final = 256
# Revisions that compaction forgets at one go, so that commits never wait long behind it.
COMPACT_BATCH: Final = 500

_GET = "SELECT value, generation FROM rows WHERE kind = ? AND id = ?"
_SCAN = "SELECT id, value, generation FROM rows WHERE kind = ? AND id > ? ORDER BY id LIMIT ?"
_REVISION = "SELECT max(compacted, coalesce((SELECT max(revision) FROM changes), 0)) FROM log"
_LAST_CHANGE = "SELECT revision FROM changes WHERE revision > ? ORDER BY revision, position LIMIT 1 OFFSET ?"
_CHANGES = (
    "SELECT revision, kind, id, value FROM changes WHERE revision > ? AND revision <= ? ORDER BY revision, position"
)
_PUT = (
    "INSERT INTO rows (kind, id, generation, value) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (kind, id) DO UPDATE SET generation = excluded.generation, value = excluded.value"
)
_LOG = "INSERT INTO changes (revision, position, kind, id, value) VALUES (?, ?, ?, ?, ?)"
_FOREVER = 2**63 - 1


class SqliteStore:
    """:class:`mica.ports.store.Store` in a file. Make it with :meth:`open`, end it with :meth:`close`.

    One process at a time: commits of another are seen by reads, but do not end a :meth:`wait`. Beyond what the
    protocol names, every method raises ``insufficient-disk``, ``corrupt`` or ``internal`` (an I/O error), with nothing
    half done, and ``busy`` after :meth:`close`.
    """

    def __init__(self, path: Path, writer: Writer, rows: sqlite3.Connection, lists: sqlite3.Connection) -> None:
        self._path = path
        self._writer = writer
        self._rows = rows
        self._lists = lists
        self._listing = asyncio.Lock()
        self._waiters = Waiters()
        self._written = 0
        self._durable = True
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open or create the database at ``path``.

        Raises ``corrupt``, ``home-newer``, ``insufficient-disk``, ``forbidden``, ``busy``.
        """
        writer = Writer(lambda: open_database(path))
        await writer.start()
        connections: list[sqlite3.Connection] = []
        try:
            with translated(path):
                connections = [connect(path, read_only=True), connect(path, read_only=True)]
                store = cls(path, writer, *connections)
                store._written = store._read_revision(store._rows)
        except BaseException:
            for connection in connections:
                connection.close()
            await writer.close()
            raise
        return store

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, key: Key) -> Row | None:
        self._check_open()
        with translated(self._path):
            # fetchall, because a cursor that is not read to its end would keep its old snapshot open.
            found = self._rows.execute(_GET, key).fetchall()
        return Row(key, *found[0]) if found else None

    async def scan(self, kind: str, *, after: str = "", limit: int | None = None) -> list[Row]:
        self._check_open()
        wanted = -1 if limit is None else max(limit, 0)
        if 0 <= wanted <= BATCH:
            with translated(self._path):
                found = self._rows.execute(_SCAN, (kind, after, wanted)).fetchall()
        else:
            async with self._snapshot() as connection:
                found = await _in_batches(connection, _SCAN, (kind, after, wanted))
        return [Row(Key(kind, id_), value, generation) for id_, value, generation in found]

    async def commit(self, transaction: Transaction, *, durable: bool = True) -> int:
        self._check_open()
        check_transaction(transaction)
        try:
            return await self._writer.run(lambda connection: self._commit(connection, transaction, durable))
        finally:
            # Also when we were cancelled or refused: somebody waits for what did get written.
            self._waiters.wake(self._written)

    async def revision(self) -> int:
        self._check_open()
        with translated(self._path):
            return self._read_revision(self._rows)

    async def changes(self, since: int, *, limit: int = 1000) -> list[Change]:
        self._check_open()
        async with self._snapshot() as connection:
            compacted: int = connection.execute("SELECT compacted FROM log").fetchall()[0][0]
            if since < compacted:
                raise Compacted(compacted + 1)
            if limit < 1:
                return []
            last = connection.execute(_LAST_CHANGE, (since, limit - 1)).fetchall()
            upto = last[0][0] if last else _FOREVER
            found = await _in_batches(connection, _CHANGES, (since, upto))
        return [Change(revision, Key(kind, id_), value) for revision, kind, id_, value in found]

    async def wait(self, since: int) -> int:
        present = await self.revision()
        return present if present > since else await self._waiters.wait(since)

    async def compact(self, keep: int) -> None:
        self._check_open()
        upto = await self.revision() - max(keep, 0)
        while await self._writer.run(lambda connection: self._compact(connection, upto)):
            pass

    async def close(self) -> None:
        """Finish commits that were asked for, copy the log into the database, and let go of the file."""
        if not self._closed:
            self._closed = True
            self._waiters.close()
            # A list may be under way in another task; its connection must not vanish below it.
            async with self._listing:
                self._lists.close()
            self._rows.close()
        await self._writer.close()

    # In the event loop.

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    @contextlib.asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[sqlite3.Connection]:
        """A connection on which everything read is of one moment, for one task at a time."""
        async with self._listing:
            self._check_open()
            with translated(self._path):
                self._lists.execute("BEGIN")
                try:
                    yield self._lists
                finally:
                    self._lists.execute("ROLLBACK")

    @staticmethod
    def _read_revision(connection: sqlite3.Connection) -> int:
        revision = connection.execute(_REVISION).fetchall()[0][0]
        assert isinstance(revision, int)
        return revision

    # In the writer's thread.

    def _commit(self, connection: sqlite3.Connection, transaction: Transaction, durable: bool) -> int:
        with translated(self._path):
            if durable != self._durable:
                # Only takes effect outside a transaction.
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            connection.execute("BEGIN IMMEDIATE")
            try:
                revision, wrote = self._apply(connection, transaction)
                connection.execute("COMMIT" if wrote else "ROLLBACK")
            except BaseException:
                if connection.in_transaction:  # SQLite rolls back by itself when the disk is full
                    connection.execute("ROLLBACK")
                raise
        self._written = revision
        return revision

    def _apply(self, connection: sqlite3.Connection, transaction: Transaction) -> tuple[int, bool]:
        """Check and write within the open transaction; return the revision and whether there is anything to commit."""
        for key, expected in transaction.expect.items():
            found = connection.execute(_GET, key).fetchall()
            generation = found[0][1] if found else ABSENT
            if generation != expected:
                raise Conflict(key, expected, generation)
        present = self._read_revision(connection)
        revision, position = present + 1, 0
        for key, value in transaction.put.items():
            connection.execute(_PUT, (key.kind, key.id, revision, value))
            connection.execute(_LOG, (revision, position, key.kind, key.id, value))
            position += 1
        for key in dict.fromkeys(transaction.delete):
            if connection.execute("DELETE FROM rows WHERE kind = ? AND id = ?", key).rowcount:
                connection.execute(_LOG, (revision, position, key.kind, key.id, None))
                position += 1
        return (revision, True) if position else (present, False)

    def _compact(self, connection: sqlite3.Connection, upto: int) -> bool:
        """Forget some of the revisions up to ``upto``; say whether there are more of them."""
        with translated(self._path):
            connection.execute("BEGIN IMMEDIATE")
            try:
                compacted: int = connection.execute("SELECT compacted FROM log").fetchall()[0][0]
                until = min(compacted + COMPACT_BATCH, upto)
                if until > compacted:
                    connection.execute("DELETE FROM changes WHERE revision <= ?", (until,))
                    connection.execute("UPDATE log SET compacted = ?", (until,))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        return until < upto


async def _in_batches(connection: sqlite3.Connection, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    with contextlib.closing(connection.execute(sql, parameters)) as cursor:
        while batch := cursor.fetchmany(BATCH):
            found += batch
            if len(batch) == BATCH:
                await asyncio.sleep(0)
    return found
