"""Templates: what `mica run NAME` begins at beside images."""

from __future__ import annotations

import msgspec

from mica.client.operations import OnProgress, Operations
from mica.client.snapshots import verdict
from mica.client.transport import Transport, path_of
from mica.model.operation import Operation
from mica.model.views import SnapshotPage, SnapshotSet, SnapshotView, TemplateCreate


class Templates:
    """``client.templates``. A template is named by its name, its id, or the beginning of its id (8 characters or more).

    A verb waits for its operation and returns it; with ``wait=False`` it returns as soon as it is accepted.
    """

    def __init__(self, transport: Transport, operations: Operations) -> None:
        self._transport = transport
        self._operations = operations

    async def list(self) -> list[SnapshotView]:
        """All of them, by name."""
        page = await self._transport.request("GET", path_of("templates"), SnapshotPage)
        return list(page.items)

    async def get(self, template: str) -> SnapshotView:
        """Raises ``not-found``."""
        return await self._transport.request("GET", path_of("templates", template), SnapshotView)

    async def create(
        self, body: TemplateCreate, *, wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """Freeze a VM as it is now; it goes on after a moment. The template's id is in ``result["id"]``.

        Raises ``exists``, ``state-conflict``, ``insufficient-disk``.
        """
        return await self._verb("POST", path_of("templates"), body, wait, on_progress)

    async def set(
        self, template: str, body: SnapshotSet, *, wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """Another name or description, protection from being deleted, VMs that stand by. Raises ``exists``,
        ``invalid``."""
        return await self._verb("PATCH", path_of("templates", template), body, wait, on_progress)

    async def delete(self, template: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """VMs that began at it stay as they are. Raises ``protected``, ``in-use``."""
        return await self._verb("DELETE", path_of("templates", template), None, wait, on_progress)

    async def verify(self, template: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Read every byte and compare with the checksums. Raises ``corrupt`` naming what is damaged."""
        operation = await self._verb("POST", path_of("templates", template, "verify"), None, wait, on_progress)
        return verdict(operation) if wait else operation

    async def _verb(
        self, method: str, path: str, body: msgspec.Struct | None, wait: bool, on_progress: OnProgress | None
    ) -> Operation:
        operation = await self._transport.request(method, path, Operation, body=body)
        return await self._operations.wait(operation.id, on_progress) if wait else operation
