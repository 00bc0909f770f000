"""Records of commands in guests, as rows."""

from __future__ import annotations

from mica.engine.records import Draft, Records
from mica.model.exec import ExecRecord
from mica.ports.store import ABSENT, Conflict


class ExecRows:
    """Implements :class:`mica.ports.execs.ExecRecords` over the engine's store."""

    def __init__(self, records: Records) -> None:
        self._records = records

    async def save(self, record: ExecRecord) -> None:
        # One command has one writer; not durable, because a power cut takes the guest and its command along.
        known = await self._records.execs.get(record.id)
        draft = Draft()
        draft.put(self._records.execs, record.id, record, known.generation if known else ABSENT)
        try:
            await self._records.commit(draft, durable=False)
        except Conflict:
            await self._records.execs.update(record.id, lambda _: record, durable=False)

    async def all(self) -> list[ExecRecord]:
        return [row.value for row in (await self._records.execs.scan()).values()]

    async def remove(self, ids: list[str]) -> None:
        draft = Draft()
        for id_ in ids:
            draft.delete(self._records.execs, id_)
        await self._records.commit(draft, durable=False)
