"""A store that fails where a test wants it to: the heart of the crash harness.

A crash is not an exception that anybody handles: from that moment on the process does nothing more. So once
:class:`Crash` has been raised, every further call on the same :class:`FaultyStore` raises it too, and clean-up code
that a dead process could not have run leaves no trace. The next life of the engine gets a new wrapper over ``inner``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec

from mica.model.errors import Code, MicaError
from mica.ports.store import Change, Conflict, Key, Row, Store, Transaction
from mica.store.memory import MemoryStore


class Crash(BaseException):
    """The process dies here. Not an :class:`Exception`, so that nothing handles it by accident."""


class When(StrEnum):
    """``before``: the commit is not written. ``after``: it is written, but nobody is told."""

    BEFORE = "before"
    AFTER = "after"


class Fault(msgspec.Struct, frozen=True):
    """At commit number ``at`` (the first is 1), ``error`` is raised; without one it is a :class:`Crash`."""

    at: int
    when: When = When.BEFORE
    error: Exception | None = None


def io_error() -> MicaError:
    """What the SQLite store raises when its disk fails."""
    return MicaError(Code.INTERNAL, "the database failed: disk I/O error", hint="look at the kernel's log: dmesg")


def disk_full() -> MicaError:
    """What the SQLite store raises when its file system is full."""
    return MicaError(Code.INSUFFICIENT_DISK, "the file system is full; nothing was written", retryable=True)


def conflict(key: Key = Key("vm", "somebody-was-quicker")) -> Conflict:  # noqa: B008 - a Key is immutable
    return Conflict(key, 1, 2)


class FaultyStore:
    """:class:`mica.ports.store.Store` that passes everything on to ``inner`` until a fault is due.

    ``commits`` counts calls of :meth:`commit` that ``counts`` says yes to (all, unless given).
    """

    def __init__(
        self, inner: Store, faults: Iterable[Fault] = (), *, counts: Callable[[Transaction], bool] = lambda _: True
    ) -> None:
        self.inner = inner
        self.faults = list(faults)
        self.commits = 0
        self.crashed = False
        self._counts = counts
        self._history: list[tuple[Transaction, bool]] = []

    async def get(self, key: Key) -> Row | None:
        self._check_alive()
        return await self.inner.get(key)

    async def scan(self, kind: str, *, after: str = "", limit: int | None = None) -> list[Row]:
        self._check_alive()
        return await self.inner.scan(kind, after=after, limit=limit)

    async def commit(self, transaction: Transaction, *, durable: bool = True) -> int:
        self._check_alive()
        if not self._counts(transaction):
            return await self._write(transaction, durable)
        self.commits += 1
        number = self.commits
        self._strike(number, When.BEFORE)
        revision = await self._write(transaction, durable)
        self._strike(number, When.AFTER)
        return revision

    async def revision(self) -> int:
        self._check_alive()
        return await self.inner.revision()

    async def changes(self, since: int, *, limit: int = 1000) -> list[Change]:
        self._check_alive()
        return await self.inner.changes(since, limit=limit)

    async def wait(self, since: int) -> int:
        self._check_alive()
        revision = await self.inner.wait(since)
        self._check_alive()
        return revision

    async def compact(self, keep: int) -> None:
        self._check_alive()
        await self.inner.compact(keep)

    async def close(self) -> None:
        """Close ``inner``, unless the process is dead: then the next life still needs it."""
        if not self.crashed:
            await self.inner.close()

    async def after_power_cut(self, *, survivors: int = 0) -> MemoryStore:
        """A store as a power cut would have left it: everything up to the last durable commit that went through here,
        and of those after it the first ``survivors``. ``inner`` must have been empty when it was wrapped.
        """
        last = max((at for at, (_, durable) in enumerate(self._history, 1) if durable), default=0)
        store = MemoryStore()
        for transaction, _ in self._history[: last + survivors]:
            await store.commit(transaction)
        return store

    async def _write(self, transaction: Transaction, durable: bool) -> int:
        revision = await self.inner.commit(transaction, durable=durable)
        self._history.append((transaction, durable))
        return revision

    def _check_alive(self) -> None:
        if self.crashed:
            raise Crash("the process is dead already")

    def _strike(self, number: int, when: When) -> None:
        for fault in self.faults:
            if fault.at == number and fault.when is when:
                if fault.error is not None:
                    raise fault.error
                self.crashed = True
                raise Crash(f"{when} commit {number}")
