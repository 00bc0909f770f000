"""The SQLite database: opening it, knowing it for ours, and bringing an older one up to date.

    rows     what is: one row per key, with the revision that wrote it
    changes  the change log: one row per key and commit, ``value`` NULL where the commit deleted it
    log      one row: ``compacted``, the highest revision that the change log has forgotten

The revision of the database is the greatest one in ``changes``, or ``log.compacted`` when the log is empty: it needs
no counter that every commit would have to write again. A migration, once released, never changes; a new one is added.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from mica.model.errors import Code, MicaError

# Bytes 68 to 71 of the file (SQLite file format, section 1.3.2): "MICA".
APPLICATION_ID: Final = 0x4D494341
BUSY_TIMEOUT_S: Final = 5.0
# The write-ahead log is cut back to this size once its content has been copied into the database.
_LOG_SIZE_LIMIT: Final = 16 * 1024**2


class Migration(NamedTuple):
    """One step from schema ``version - 1`` to ``version``, applied in one transaction."""

    version: int
    name: str
    statements: tuple[str, ...]


MIGRATIONS: Final = (
    Migration(
        1,
        "rows and change log",
        (
            """CREATE TABLE rows (
                kind TEXT NOT NULL, id TEXT NOT NULL, generation INTEGER NOT NULL, value BLOB NOT NULL,
                PRIMARY KEY (kind, id)
            ) STRICT""",
            """CREATE TABLE changes (
                revision INTEGER NOT NULL, position INTEGER NOT NULL,
                kind TEXT NOT NULL, id TEXT NOT NULL, value BLOB,
                PRIMARY KEY (revision, position)
            ) STRICT""",
            "CREATE TABLE log (compacted INTEGER NOT NULL) STRICT",
            "INSERT INTO log VALUES (0)",
        ),
    ),
)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into :class:`MicaError` naming the file and the way out."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(path, error) from error


def _translate(path: Path, error: sqlite3.Error) -> MicaError:
    # Extended result codes keep the primary one in the low byte (https://sqlite.org/rescode.html).
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return MicaError(
            Code.INSUFFICIENT_DISK,
            f"the file system of {path} is full; nothing was written",
            hint=f"free some space there: df -h {path.parent}",
            retryable=True,
            details={"path": str(path)},
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged(path, str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return MicaError(
            Code.BUSY,
            f"{path} stayed locked by another process for {BUSY_TIMEOUT_S:g} s",
            hint=f"see who has it open: fuser -v {path}",
            retryable=True,
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return MicaError(
            Code.FORBIDDEN, f"{path} cannot be written: {error}", hint=f"look at its owner and mode: ls -ld {path}"
        )
    return MicaError(
        Code.INTERNAL,
        f"the database {path} failed: {error}",
        hint="look at the kernel's log for errors of the disk below it: dmesg",
        details={"path": str(path), "sqlite": getattr(error, "sqlite_errorname", "")},
    )


def damaged(path: Path, what: str) -> MicaError:
    return MicaError(
        Code.CORRUPT,
        f"{path} is damaged or not a database of Mica: {what}",
        hint=f"put back a copy, or save what is readable with: sqlite3 {path} .recover; disks of VMs are not in it",
        details={"path": str(path), "found": what},
    )


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection without implicit transactions that may be used from any one thread at a time."""
    # Readers open for writing too, because a read-only connection could not recover the log after a crash;
    # query_only is what keeps them from writing.
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=64
    )
    try:
        connection.execute(f"PRAGMA query_only = {int(read_only)}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_SIZE_LIMIT}")
    except BaseException:
        connection.close()
        raise
    return connection


def open_database(path: Path) -> sqlite3.Connection:
    """Create or open, check and migrate the database; return the connection that writes it.

    A database whose last user did not close it is checked first. Raises ``corrupt``, ``home-newer``,
    ``insufficient-disk``, ``forbidden``, ``busy``; a database that was refused is left as it was.
    """
    unclean = _create_file(path)
    with translated(path):
        connection = connect(path)
        try:
            _check(connection, path, thorough=unclean)
            connection.execute("PRAGMA journal_mode = WAL")
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _create_file(path: Path) -> bool:
    """Make an empty file that only its owner may read; say whether an unfinished write-ahead log lies beside it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        log = path.with_name(path.name + "-wal")
        return log.exists() and log.stat().st_size > 0
    except OSError as error:
        raise MicaError(
            Code.FORBIDDEN,
            f"{path} cannot be opened: {error.strerror}",
            hint=f"look at owner, mode and mount: ls -ld {path.parent} {path}",
        ) from error


def _check(connection: sqlite3.Connection, path: Path, *, thorough: bool) -> None:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    if tables and not ours:
        raise damaged(path, f"it has tables of another program ({', '.join(sorted(tables)[:3])})")
    if ours and "schema_version" not in tables:
        raise damaged(path, "its table schema_version is missing")
    found = schema_version(connection) if ours else 0
    known = MIGRATIONS[-1].version
    if found > known:
        raise MicaError(
            Code.HOME_NEWER,
            f"{path} was written by a newer Mica: it has schema {found}, this Mica knows schemas up to {known}",
            hint="install that Mica again, or give this one a home of its own with MICA_HOME",
            details={"found": found, "known": known, "path": str(path)},
        )
    if thorough:
        said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise damaged(path, said)


def schema_version(connection: sqlite3.Connection) -> int:
    version = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()[0]
    assert isinstance(version, int)
    return version


def _migrate(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT"
        )
        present = schema_version(connection)
        for migration in MIGRATIONS:
            if migration.version > present:
                for statement in migration.statements:
                    connection.execute(statement)
                connection.execute("INSERT INTO schema_version VALUES (?, ?)", (migration.version, migration.name))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
