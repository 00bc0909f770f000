"""Snapshots of VMs, and forks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from mica.client.operations import OnProgress, Operations
from mica.client.transport import Transport, path_of
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.views import (
    ForkAccepted,
    SnapshotCreate,
    SnapshotPage,
    SnapshotRestore,
    SnapshotSet,
    SnapshotView,
    VmClone,
    VmFork,
)


def verdict(operation: Operation) -> Operation:
    """A ``snapshot.verify`` that has ended, if it found nothing. Raises ``corrupt`` naming what it found."""
    damaged = operation.result.get("damaged")
    if not damaged:
        return operation
    vm, slash, name = operation.target_name.partition("/")
    what = f"snapshot {name} of {vm}" if slash else f"template {vm}"
    raise MicaError(
        Code.CORRUPT,
        f"{what} is damaged: {'; '.join(damaged.values())}",
        hint=f"go back to another one: mica snapshot list {vm}" if slash else "make another one, and delete this",
        details={"damaged": damaged, "operation": operation.id},
    )


class Snapshots:
    """``client.snapshots``. A snapshot is named by its name within its VM, its id, or the beginning of its id (8
    characters at least).

    A verb waits for its operation and returns it; with ``wait=False`` it returns as soon as it is accepted.
    """

    def __init__(self, transport: Transport, operations: Operations) -> None:
        self._transport = transport
        self._operations = operations

    async def list(self, vm: str = "", *, forks: bool = False) -> list[SnapshotView]:
        """Of all VMs, or of one, oldest first; with ``forks`` also the moments at which forks began."""
        path = path_of("vms", vm, "snapshots") if vm else path_of("snapshots")
        page = await self._transport.request("GET", path, SnapshotPage, params={"all": forks})
        return list(page.items)

    async def get(self, vm: str, snapshot: str) -> SnapshotView:
        """Raises ``not-found``."""
        return await self._transport.request("GET", path_of("vms", vm, "snapshots", snapshot), SnapshotView)

    async def create(
        self, vm: str, body: SnapshotCreate, *, wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """Take one. The VM goes on after a moment (``result["pause_s"]`` seconds); the operation ends when all of the
        snapshot is on disk with its checksums. Its id is in ``result["id"]``.

        Raises ``exists``, ``state-conflict``, ``insufficient-disk``.
        """
        return await self._verb("POST", path_of("vms", vm, "snapshots"), body, wait, on_progress)

    async def restore(
        self,
        vm: str,
        snapshot: str,
        body: SnapshotRestore,
        *,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Operation:
        """Bring the VM back to it, in place; its present state becomes a snapshot first, unless ``keep`` is false.

        Raises ``corrupt`` (nothing is changed then), ``host-lacks`` where its memory does not fit this host's QEMU.
        """
        return await self._verb("POST", path_of("vms", vm, "snapshots", snapshot, "restore"), body, wait, on_progress)

    async def set(
        self, vm: str, snapshot: str, body: SnapshotSet, *, wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """Another name or description, or protection from being deleted. Raises ``exists``."""
        return await self._verb("PATCH", path_of("vms", vm, "snapshots", snapshot), body, wait, on_progress)

    async def delete(
        self, vm: str, snapshot: str, *, wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """What other snapshots and VMs need of it stays. Raises ``protected``, ``in-use``."""
        return await self._verb("DELETE", path_of("vms", vm, "snapshots", snapshot), None, wait, on_progress)

    async def verify(
        self, vm: str, snapshot: str, *, wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """Read every byte and compare with the checksums. Raises ``corrupt`` naming what is damaged; without
        ``wait``, see :func:`verdict`."""
        path = path_of("vms", vm, "snapshots", snapshot, "verify")
        operation = await self._verb("POST", path, None, wait, on_progress)
        return verdict(operation) if wait else operation

    async def fork(self, vm: str, body: VmFork) -> ForkAccepted:
        """Running copies of a VM; returns as soon as they are accepted: see :meth:`forked`."""
        return await self._transport.request("POST", path_of("vms", vm, "fork"), ForkAccepted, body=body)

    async def clone(self, vm: str, body: VmClone) -> ForkAccepted:
        """A stopped copy of a VM that is stopped; returns as soon as it is accepted: see :meth:`forked`."""
        return await self._transport.request("POST", path_of("vms", vm, "clone"), ForkAccepted, body=body)

    async def forked(self, accepted: ForkAccepted, on_progress: OnProgress | None = None) -> Sequence[Operation]:
        """The operations of the copies once all run, each with its times; the ids are in their ``target``.

        Raises what the first failed with, or what kept the moment of the fork from being taken; copies that run are
        named in ``details["running"]`` and go on.
        """
        waiting = [self._operations.wait(operation.id, on_progress) for operation in accepted.operations]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        done = [result for result in results if isinstance(result, Operation)]
        for result in results:
            if isinstance(result, BaseException):
                error = result
                if isinstance(error, MicaError):
                    error = await self._reason(accepted, error)
                    error.details = {**error.details, "running": [operation.target_name for operation in done]}
                raise error
        return done

    async def _reason(self, accepted: ForkAccepted, error: MicaError) -> MicaError:
        """Copies of a moment that could not be taken fail for that alone."""
        if accepted.freeze is not None:
            try:
                await self._operations.wait(accepted.freeze.id)
            except MicaError as reason:
                return reason
        return error

    async def _verb(
        self,
        method: str,
        path: str,
        body: msgspec.Struct | None,
        wait: bool,
        on_progress: OnProgress | None,
    ) -> Operation:
        operation = await self._transport.request(method, path, Operation, body=body)
        return await self._operations.wait(operation.id, on_progress) if wait else operation
