"""Where the records of commands in guests are kept."""

from __future__ import annotations

from typing import Protocol

from mica.model.exec import ExecRecord


class ExecRecords(Protocol):
    """Durable records, so that the next daemon finds the commands that run. All verbs are idempotent."""

    async def save(self, record: ExecRecord) -> None: ...

    async def all(self) -> list[ExecRecord]: ...

    async def remove(self, ids: list[str]) -> None: ...
