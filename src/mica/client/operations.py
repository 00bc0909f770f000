"""Operations: list, look at, wait for, cancel and resolve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from mica.client.transport import Params, Transport, path_of
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation, OperationState
from mica.model.views import OperationPage, Resolve

OnProgress = Callable[[Operation], None]

WAIT_TIMEOUT_S = 3600.0
_POLL_S = 30.0
_PROGRESS_S = 0.5
_RECONNECT_S = 30.0
_PAGE = 500


def settled(operation: Operation) -> bool:
    """Nothing more will happen by itself: it has ended, or is stuck and waits for an operator."""
    return operation.state.ended or operation.state is OperationState.STUCK


def operation_error(operation: Operation) -> MicaError | None:
    """Why an operation did not succeed; ``None`` when it did or has not settled. ``details`` names the operation."""
    if operation.state is OperationState.SUCCEEDED or not settled(operation):
        return None
    what = f"{operation.verb} {operation.target_name or operation.target}".strip()
    if operation.state is OperationState.STUCK:
        error = MicaError(
            Code.STUCK,
            f"{what} could not be undone" + (f": {operation.problem.message}" if operation.problem else ""),
            hint=f"look: mica operation show {operation.id}; then: mica operation resolve {operation.id} retry|accept",
        )
    elif operation.problem is not None:
        error = MicaError.of(operation.problem)
    elif operation.state is OperationState.CANCELLED:
        error = MicaError(Code.CANCELLED, f"{what} was cancelled", hint="what it had done is undone")
    else:
        error = MicaError(Code.INTERNAL, f"{what} failed without saying why", hint="see: mica daemon log")
    error.details = {**error.details, "operation": operation.id}
    return error


class Operations:
    """``client.operations``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def list(self, *, vm: str = "", active: bool = False, limit: int = 100) -> list[Operation]:
        """The newest ``limit`` operations, of one VM if ``vm`` is given, only unfinished ones if ``active``."""
        out: list[Operation] = []
        after = ""
        while len(out) < limit:
            params: Params = {"vm": vm, "active": active, "after": after, "limit": min(_PAGE, limit - len(out))}
            page = await self._transport.request("GET", path_of("operations"), OperationPage, params=params)
            out += page.items
            after = page.next
            if not after:
                break
        return out[:limit]

    async def get(self, operation_id: str) -> Operation:
        return await self._transport.request("GET", path_of("operations", operation_id), Operation)

    async def cancel(self, operation_id: str) -> Operation:
        """Ask it to stop; what it has done is undone. Raises ``state-conflict`` when it has ended."""
        return await self._transport.request("POST", path_of("operations", operation_id, "cancel"), Operation)

    async def resolve(self, operation_id: str, how: str) -> Operation:
        """Decide about a stuck operation: ``retry`` its undo, or ``accept`` what is left as it is."""
        path = path_of("operations", operation_id, "resolve")
        return await self._transport.request("POST", path, Operation, body=Resolve(how))

    async def wait(
        self, operation_id: str, on_progress: OnProgress | None = None, *, timeout_s: float = WAIT_TIMEOUT_S
    ) -> Operation:
        """Wait until it has succeeded and return it; ``on_progress`` is called with what is known now and then.

        A daemon that dies meanwhile is waited for (and started anew where this client starts daemons): the operation
        is durable. Raises what the operation failed with, ``cancelled``, ``stuck``, and ``timeout`` after
        ``timeout_s`` seconds; the operation then goes on.
        """
        operation = await self.settle(operation_id, on_progress, timeout_s=timeout_s)
        error = operation_error(operation)
        if error is not None:
            raise error
        return operation

    async def settle(
        self, operation_id: str, on_progress: OnProgress | None = None, *, timeout_s: float = WAIT_TIMEOUT_S
    ) -> Operation:
        """Like :meth:`wait`, but return the operation however it ended."""
        deadline = time.monotonic() + timeout_s
        slice_s = _PROGRESS_S if on_progress else _POLL_S
        first = True
        while True:
            # The first look does not wait, so that progress shows at once.
            wait_s = 0.0 if first and on_progress else max(0.0, min(slice_s, deadline - time.monotonic()))
            operation = await self._look(operation_id, wait_s)
            first = False
            if on_progress:
                on_progress(operation)
            if settled(operation):
                return operation
            if time.monotonic() >= deadline:
                raise MicaError(
                    Code.TIMEOUT,
                    f"{operation.verb} {operation.target_name} has not ended after {timeout_s:g} s",
                    hint=f"it goes on: mica operation wait {operation_id}",
                    details={"operation": operation_id},
                )

    async def _look(self, operation_id: str, wait_s: float) -> Operation:
        """One long poll that outlives a restart of the daemon."""
        path = path_of("operations", operation_id)
        give_up = time.monotonic() + _RECONNECT_S
        pause = 0.1
        while True:
            try:
                return await self._transport.request(
                    "GET", path, Operation, params={"wait": wait_s or None}, timeout_s=wait_s + 15
                )
            except MicaError as error:
                if error.code is not Code.DAEMON_UNREACHABLE or time.monotonic() > give_up:
                    raise
            # Nothing signals that a daemon is back.
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)
