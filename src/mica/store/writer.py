"""One thread that owns one connection, and the bounded queue before it."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from mica.store.waiters import closed

T = TypeVar("T")

MAX_WAITING: Final = 1024
# How long a cancelled caller still waits for its job, so that it knows what was written. A disk that hangs longer
# than this must not keep the daemon from ending.
CANCEL_GRACE_S: Final = 10.0

_Job = tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]


class Writer:
    """Runs jobs one after the other in the order in which they were asked for."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(MAX_WAITING)
        # Bounded by the slots: a queue with a limit of its own would have to block the event loop.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._closing = False
        # A daemon thread, because an interpreter that ends without close() must not hang: SQLite bears that.
        self._thread = threading.Thread(target=self._serve, name="mica-store-writer", daemon=True)

    async def start(self) -> None:
        """Open the connection in the thread; raises what opening it raised."""
        self._thread.start()
        try:
            await asyncio.shield(self._opened)
        except asyncio.CancelledError:
            await self.close()
            raise

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``job`` in the thread. A caller who is cancelled gets to know that once the job has ended."""
        if self._closing:
            raise closed()
        async with self._slots:
            if self._closing:
                raise closed()
            future: asyncio.Future[T] = self._loop.create_future()
            self._jobs.put((job, future))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                await asyncio.wait([future], timeout=CANCEL_GRACE_S)
                raise

    async def close(self) -> None:
        """Finish what was asked for, then close the connection and end the thread. Idempotent."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    def _serve(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:  # noqa: BLE001 - whatever it is, start() raises it
            self._tell(self._opened, None, error)
            self._tell(self._ended, None, None)
            return
        self._tell(self._opened, None, None)
        try:
            while (entry := self._jobs.get()) is not None:
                job, future = entry
                try:
                    result = job(connection)
                except BaseException as error:  # noqa: BLE001 - whatever it is, run() raises it
                    self._tell(future, None, error)
                else:
                    self._tell(future, result, None)
                del entry, job, future
        finally:
            connection.close()
            self._tell(self._ended, None, None)

    def _tell(self, future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(_settle, future, result, error)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The event loop ended without closing the store: nobody is left who could be told.


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # marks it as seen, for the caller who was cancelled and has gone
