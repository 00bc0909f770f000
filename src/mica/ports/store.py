"""What the engine needs from a place that keeps rows.

The primitive is one: a transaction that checks the generations of rows and writes rows, all or nothing. SQLite and
etcd both have it, so nothing above may ask for more. Every commit has a revision; a row's generation is the revision
that wrote it; the change log is the list of commits, which is also what the event stream is made of.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

ABSENT = 0


class Key(NamedTuple):
    """``kind`` is a noun (``vm``, ``operation`` …); ``id`` is unique within it."""

    kind: str
    id: str


class Row(msgspec.Struct, frozen=True):
    """A stored value. ``generation`` is the revision of the commit that wrote it, never 0."""

    key: Key
    value: bytes
    generation: int


class Change(msgspec.Struct, frozen=True):
    """One row as one commit left it; ``value`` is ``None`` where the commit deleted it."""

    revision: int
    key: Key
    value: bytes | None


class Transaction(msgspec.Struct, frozen=True):
    """``expect`` maps a key to the generation it must have (``ABSENT``: it must not exist)."""

    expect: dict[Key, int] = {}
    put: dict[Key, bytes] = {}
    delete: tuple[Key, ...] = ()


class Conflict(Exception):  # noqa: N818 - it is an answer, and the engine's own: it never leaves the engine
    """An expected generation did not hold; nothing was written. ``key`` names the first row that differed."""

    def __init__(self, key: Key, expected: int, found: int) -> None:
        super().__init__(f"{key.kind} {key.id}: generation {found}, expected {expected}")
        self.key, self.expected, self.found = key, expected, found


class Compacted(Exception):  # noqa: N818
    """Changes that old are no longer kept; ``oldest`` is the first revision from which changes are complete."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"changes before revision {oldest} are no longer kept")
        self.oldest = oldest


class Store(Protocol):
    """Rows with generations. Safe to use from one event loop; reads see every commit that has returned."""

    async def get(self, key: Key) -> Row | None: ...

    async def scan(self, kind: str, *, after: str = "", limit: int | None = None) -> list[Row]:
        """Rows of one kind in order of id, those with an id greater than ``after`` first."""

    async def commit(self, transaction: Transaction, *, durable: bool = True) -> int:
        """Check and write, all or nothing; return the revision. Raises :class:`Conflict`.

        ``durable`` commits survive a power cut when this returns. Others survive the death of the daemon, and a power
        cut may take back the last of them, in order: enough for a step log whose steps can be repeated.
        A transaction that only expects writes nothing and returns the present revision.
        """

    async def revision(self) -> int:
        """The revision of the last commit; 0 in an empty store."""

    async def changes(self, since: int, *, limit: int = 1000) -> list[Change]:
        """Changes with a revision greater than ``since``, oldest first, whole commits only.

        May return more than ``limit`` so as not to cut a commit. Raises :class:`Compacted`.
        """

    async def wait(self, since: int) -> int:
        """Return the revision as soon as it is greater than ``since``."""

    async def compact(self, keep: int) -> None:
        """Forget all but the last ``keep`` revisions of the change log; rows stay."""

    async def close(self) -> None: ...
