"""Snapshots that are taken by themselves."""

from __future__ import annotations

from mica.client.operations import Operations
from mica.client.transport import Transport, path_of
from mica.model.operation import Operation
from mica.model.schedule import ScheduleCreate, SchedulePage, ScheduleView
from mica.model.units import parse_duration


class Schedules:
    """``client.schedules``. A schedule is named by its id, or the beginning of it (8 characters at least)."""

    def __init__(self, transport: Transport, operations: Operations) -> None:
        self._transport = transport
        self._operations = operations

    async def list(self) -> list[ScheduleView]:
        """All of them, oldest first."""
        return list((await self._transport.request("GET", path_of("schedules"), SchedulePage)).items)

    async def get(self, schedule: str) -> ScheduleView:
        """Raises ``not-found``."""
        return await self._transport.request("GET", path_of("schedules", schedule), ScheduleView)

    async def create(
        self,
        *,
        vm: str = "",
        label: str = "",
        every: str | float = "1h",
        keep: str = "24h,7d,4w",
        memory: bool = True,
    ) -> ScheduleView:
        """Have snapshots taken of a VM, or of all with a label (``KEY`` or ``KEY=VALUE``), the first ones at once.

        ``every`` is in seconds or words; ``keep`` tells which stay. Raises ``invalid``, ``not-found``.
        """
        every_s = parse_duration(every) if isinstance(every, str) else every
        body = ScheduleCreate(vm=vm, label=label, every_s=every_s, keep=keep, memory=memory)
        operation = await self._transport.request("POST", path_of("schedules"), Operation, body=body)
        return await self.get((await self._operations.wait(operation.id)).result["id"])

    async def delete(self, schedule: str) -> None:
        """No more are taken, and none expires any more: those that there are stay until somebody deletes them."""
        operation = await self._transport.request("DELETE", path_of("schedules", schedule), Operation)
        await self._operations.wait(operation.id)
