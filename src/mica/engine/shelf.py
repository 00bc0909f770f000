"""Snapshots and templates as readers see them: their sizes, what is damaged of them, what began and stands by there."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.records import Versioned
from mica.engine.standbys import Stock, stocks
from mica.model.snapshot import HISTORY, Part, Snapshot, SnapshotKind, SnapshotState
from mica.model.units import Bytes
from mica.model.views import SnapshotView
from mica.model.vm import Vm

# All others come and go with what they are for.
_LISTED = (*HISTORY, SnapshotKind.TEMPLATE)


class Shelf:
    """The rows that snapshots are told from, read once for all that are told."""

    def __init__(
        self,
        snapshots: dict[str, Versioned[Snapshot]],
        parts: dict[str, Part],
        damaged: dict[str, str],
        vms: list[Vm],
        standing: dict[str, Stock],
    ) -> None:
        self._standing = standing
        self.rows = sorted(snapshots.values(), key=lambda row: (row.value.created_at, row.value.id))
        self._parts = parts
        self._damaged_images = damaged
        self._present = {vm.id: vm.snapshot for vm in vms}
        self._descendants: dict[str, list[Vm]] = {}
        for vm in vms:
            self._descendants.setdefault(vm.snapshot, []).append(vm)
        self._owners: dict[str, str] = {}
        # What the moment of a fork shares with a snapshot that is listed is the latter's.
        for row in sorted(self.rows, key=lambda row: row.value.kind not in _LISTED):
            for part in row.value.parts:
                self._owners.setdefault(part, row.value.id)

    @classmethod
    async def read(cls, env: Env) -> Shelf:
        records = env.records
        return cls(
            await records.snapshots.scan(),
            {id_: row.value for id_, row in (await records.parts.scan()).items()},
            {id_: row.value.damaged for id_, row in (await records.images.scan()).items() if row.value.damaged},
            [row.value for row in (await records.vms.scan()).values() if not row.value.hidden],
            await stocks(env),
        )

    def view(self, row: Versioned[Snapshot]) -> SnapshotView:
        snapshot = row.value
        known, damaged = self._needs(snapshot)
        own = [self._parts[id_] for id_ in snapshot.parts if id_ in self._parts and self._owners[id_] == snapshot.id]
        stock = self._standing.get(snapshot.id, Stock())
        checked = [part.verified_at for part in known if part.verified_at is not None]
        return SnapshotView(
            snapshot=snapshot,
            generation=row.generation,
            size=Bytes(sum(part.size for part in own)),
            memory=snapshot.memory is not None,
            current=self._present.get(snapshot.vm_id) == snapshot.id,
            complete=snapshot.state is SnapshotState.COMPLETE,
            verified_at=min(checked) if checked and len(checked) == len(known) else None,
            damaged=damaged,
            forks=tuple(sorted(vm.name for vm in self._descendants.get(snapshot.id, ()) if vm.id != snapshot.vm_id)),
            standing_by=stock.ready,
            standby_memory=stock.memory,
        )

    def _needs(self, snapshot: Snapshot) -> tuple[list[Part], tuple[str, ...]]:
        """All parts that it consists of or lies over, and what is wrong with them, in words."""
        waiting, seen = list(reversed(snapshot.parts)), set[str]()
        known: list[Part] = []
        damaged: list[str] = []
        while waiting:
            id_ = waiting.pop()
            if id_ in seen:
                continue
            seen.add(id_)
            part = self._parts.get(id_)
            if part is None:
                if snapshot.state is not SnapshotState.TAKING:
                    damaged.append(f"part {id_[:8]} is not there")
                continue
            known.append(part)
            if part.damaged:
                damaged.append(f"{part.kind} {part.name}".strip() + f": {part.damaged}")
            if part.image in self._damaged_images:
                damaged.append(f"image of {part.name}: {self._damaged_images[part.image]}")
            if part.base:
                waiting.append(part.base)
        return known, tuple(damaged)
