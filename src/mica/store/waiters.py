"""Who waits for a revision, and how they are woken: shared by the stores that live in this process."""

from __future__ import annotations

import asyncio

from mica.model.errors import Code, MicaError


def closed() -> MicaError:
    """What every call gets once the store has been closed: retryable, because the next daemon opens it again."""
    return MicaError(
        Code.BUSY, "the store is closed: the daemon is shutting down", hint="ask again in a moment", retryable=True
    )


class Waiters:
    """Futures of those who wait for a revision beyond the one they know. For one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[int], int] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, since: int) -> int:
        """Return the first revision greater than ``since`` that :meth:`wake` is told of."""
        if self._closed:
            raise closed()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[future] = since
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    def wake(self, revision: int) -> None:
        """Let those go on who wait for something older than ``revision``."""
        for future, since in list(self._waiting.items()):
            if since < revision:
                del self._waiting[future]
                if not future.done():
                    future.set_result(revision)

    def close(self) -> None:
        """Fail all who wait, and all who come later."""
        self._closed = True
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(closed())
        self._waiting.clear()
