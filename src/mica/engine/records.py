"""The engine's rows, typed: what kinds there are, and how they are read and written by compare-and-swap."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from mica.model.boot import Boot
from mica.model.errors import Code, MicaError, not_found
from mica.model.exec import ExecRecord
from mica.model.image import Image
from mica.model.operation import Operation
from mica.model.schedule import Schedule
from mica.model.snapshot import Part, Snapshot
from mica.model.standby import Standby
from mica.model.units import Bytes
from mica.model.vm import Vm, VmStatus
from mica.ports.store import ABSENT, Conflict, Key, Store, Transaction

T = TypeVar("T")

# A row is contended by a handful of writers at most; more failures than this mean that something spins.
MAX_ATTEMPTS = 32


class Versioned(msgspec.Struct, Generic[T], frozen=True):
    """A value and the generation it was read at."""

    value: T
    generation: int


class ImageRow(msgspec.Struct, frozen=True):
    """An image on this host. ``damaged`` is what verification found, empty when nothing."""

    image: Image
    verified_at: float | None = None
    damaged: str = ""


class Claim(msgspec.Struct, frozen=True):
    """A unique word (a name, a slot, an idempotency key) and the id that holds it."""

    holder: str
    note: str = ""
    at: float = 0.0


class Reservation(msgspec.Struct, frozen=True):
    """Memory promised to one VM from the moment its start was accepted until its process is gone.

    ``image`` is the RAM image (a part) that it begins at or shares, empty when its RAM is its own: ``ram`` is then what
    it has, or may come to have, for itself. The image is there once for all of them, and in none of these numbers.
    """

    ram: Bytes
    overhead: Bytes
    image: str = ""

    @property
    def total(self) -> Bytes:
        return Bytes(self.ram + self.overhead)


class Ledger(msgspec.Struct, frozen=True):
    """All promises of this host, by VM id. One row, so that two starts can never both take the last GiB."""

    reserved: dict[str, Reservation] = {}


class Mark(msgspec.Struct, frozen=True):
    """Facts about this home that outlive a daemon; ``boot_id`` is the host boot its last daemon served."""

    boot_id: str = ""


class Table(Generic[T]):
    """Rows of one kind."""

    def __init__(self, store: Store, kind: str, type_: type[T]) -> None:
        self._store = store
        self.kind = kind
        self._decoder = msgspec.json.Decoder(type_)

    def key(self, id_: str) -> Key:
        return Key(self.kind, id_)

    def decode(self, value: bytes) -> T:
        return self._decoder.decode(value)

    async def get(self, id_: str) -> Versioned[T] | None:
        row = await self._store.get(self.key(id_))
        return None if row is None else Versioned(self._decoder.decode(row.value), row.generation)

    async def need(self, id_: str) -> Versioned[T]:
        """As :meth:`get`; raises ``not-found``."""
        found = await self.get(id_)
        if found is None:
            raise not_found(self.kind, id_)
        return found

    async def scan(self, *, after: str = "", limit: int | None = None) -> dict[str, Versioned[T]]:
        rows = await self._store.scan(self.kind, after=after, limit=limit)
        return {row.key.id: Versioned(self._decoder.decode(row.value), row.generation) for row in rows}

    async def update(self, id_: str, change: Callable[[T], T], *, durable: bool = True) -> Versioned[T]:
        """Read, change and write until nobody was quicker. ``change`` is pure; it may raise to give up.

        Writes nothing when the value stays the same. Raises ``not-found``, ``busy``.
        """
        for _ in range(MAX_ATTEMPTS):
            old = await self.need(id_)
            new = change(old.value)
            if new == old.value:
                return old
            draft = Draft()
            draft.put(self, id_, new, old.generation)
            try:
                return Versioned(new, await self._store.commit(draft.transaction(), durable=durable))
            except Conflict:
                continue
        raise contended(self.kind, id_)


def contended(kind: str, id_: str) -> MicaError:
    return MicaError(Code.BUSY, f"{kind} {id_} changes too quickly to write", hint="try again", retryable=True)


class Draft:
    """A transaction in the making."""

    def __init__(self) -> None:
        self._expect: dict[Key, int] = {}
        self._put: dict[Key, bytes] = {}
        self._delete: list[Key] = []

    def expect(self, table: Table[T], id_: str, generation: int) -> None:
        self._expect[table.key(id_)] = generation

    def put(self, table: Table[T], id_: str, value: T, generation: int) -> None:
        """Write, provided that the row still has ``generation`` (``ABSENT``: does not exist yet)."""
        self._expect[table.key(id_)] = generation
        self._put[table.key(id_)] = msgspec.json.encode(value)

    def delete(self, table: Table[T], id_: str, generation: int | None = None) -> None:
        if generation is not None:
            self._expect[table.key(id_)] = generation
        self._put.pop(table.key(id_), None)
        self._delete.append(table.key(id_))

    @property
    def empty(self) -> bool:
        return not (self._put or self._delete)

    def transaction(self) -> Transaction:
        return Transaction(self._expect, self._put, tuple(self._delete))


class Records:
    """Every table of the engine over one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.vms = Table(store, "vm", Vm)
        self.statuses = Table(store, "vm.status", VmStatus)
        self.names = Table(store, "vm.name", Claim)
        self.slots = Table(store, "vm.slot", Claim)
        self.operations = Table(store, "operation", Operation)
        self.images = Table(store, "image", ImageRow)
        self.ledger = Table(store, "ledger", Ledger)
        self.keys = Table(store, "idempotency", Claim)
        self.marks = Table(store, "mark", Mark)
        self.execs = Table(store, "exec", ExecRecord)
        self.snapshots = Table(store, "snapshot", Snapshot)
        self.snapshot_names = Table(store, "snapshot.name", Claim)
        self.template_names = Table(store, "template.name", Claim)
        self.parts = Table(store, "part", Part)
        self.schedules = Table(store, "schedule", Schedule)
        self.boots = Table(store, "boot", Boot)
        self.standbys = Table(store, "standby", Standby)

    async def commit(self, draft: Draft, *, durable: bool = True) -> int:
        return await self.store.commit(draft.transaction(), durable=durable)

    async def read_ledger(self) -> Versioned[Ledger]:
        return await self.ledger.get("memory") or Versioned(Ledger(), ABSENT)

    async def transact(self, write: Callable[[Draft], Awaitable[None]], *, durable: bool = True) -> None:
        """Read, draft and commit until nobody was quicker. ``write`` reads anew each time; it may raise to give up.

        Commits nothing when the draft stays empty. Raises ``busy``.
        """
        for _ in range(MAX_ATTEMPTS):
            draft = Draft()
            await write(draft)
            if draft.empty:
                return
            try:
                await self.commit(draft, durable=durable)
            except Conflict:
                continue
            return
        raise MicaError(Code.BUSY, "rows change too quickly to write", hint="try again", retryable=True)

    async def promise(self, vm_id: str, memory: Reservation | None) -> None:
        """Promise exactly that to a VM that was admitted, or nothing any more. Idempotent."""

        await self.transact(lambda draft: self.draft_promise(draft, vm_id, memory))

    async def draft_promise(self, draft: Draft, vm_id: str, memory: Reservation | None) -> None:
        """:meth:`promise` as a part of ``draft``."""
        ledger = await self.read_ledger()
        if ledger.value.reserved.get(vm_id) == memory:
            return
        new = {k: v for k, v in ledger.value.reserved.items() if k != vm_id}
        if memory is not None:
            new[vm_id] = memory
        draft.put(self.ledger, "memory", Ledger(new), ledger.generation)

    async def release(self, vm_id: str) -> None:
        """Take back what was promised to a VM. Idempotent."""
        await self.promise(vm_id, None)

    async def resolve_vm(self, ref: str, *, trashed: bool = False) -> str:
        """The id of the VM meant by a name, an id, or the unique beginning (8 characters or more) of an id.

        A name means the VM that bears it; with ``trashed`` the one in the trash that bore it, where there is one: the
        one deleted last.
        """
        if trashed and (deleted := await self._deleted(ref)):
            return deleted
        claim = await self.names.get(ref)
        if claim is not None:
            return claim.value.holder
        if await self.vms.get(ref) is not None:
            return ref
        if len(ref) >= 8:
            # Ids that begin with ``ref`` follow it directly in the order of the store.
            near = await self.vms.scan(after=ref, limit=2)
            hits = [id_ for id_ in near if id_.startswith(ref)]
            if len(hits) == 1:
                return hits[0]
            if hits:
                raise MicaError(Code.INVALID, f"{ref!r} begins the id of several VMs", hint="write more of it")
        if deleted := await self._deleted(ref):
            return deleted
        raise not_found("VM", ref, hint="`mica vm list` lists those there are, `mica vm list --trash` the deleted ones")

    async def _deleted(self, name: str) -> str:
        """The id of the VM of this name that was deleted last and is in the trash; empty for none."""
        found = [
            (row.value.deleted_at, id_)
            for id_, row in (await self.vms.scan()).items()
            if row.value.name == name and row.value.deleted_at is not None
        ]
        return max(found)[1] if found else ""

    async def resolve_snapshot(self, vm_id: str, ref: str) -> str:
        """The id of a VM's snapshot meant by a name, an id, or the unique beginning of an id. Raises ``not-found``."""
        claim = await self.snapshot_names.get(f"{vm_id}/{ref}")
        if claim is not None:
            return claim.value.holder
        if len(ref) >= 8:
            near = await self.snapshots.scan(after=ref[:-1], limit=MAX_ATTEMPTS)
            hits = [id_ for id_, row in near.items() if id_.startswith(ref) and row.value.vm_id == vm_id]
            if len(hits) == 1:
                return hits[0]
        raise not_found("snapshot", ref, hint="`mica snapshot list` lists them all")

    async def resolve_template(self, ref: str) -> str:
        """The id of the template meant by a name, an id, or the unique beginning of an id. Raises ``not-found``."""
        claim = await self.template_names.get(ref)
        if claim is not None:
            return claim.value.holder
        if len(ref) >= 8:
            ids = {row.value.holder for row in (await self.template_names.scan()).values()}
            hits = [id_ for id_ in ids if id_.startswith(ref)]
            if len(hits) == 1:
                return hits[0]
        raise not_found("template", ref, hint="`mica template list` lists them all")
