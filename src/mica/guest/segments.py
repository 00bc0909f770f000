"""Reading one stream of a command from its segments in the guest, each byte once.

The reader says what it wants asked of the agent (``request``), takes the answer (``take``), and moves from segment to
segment as the runner's log says that one is complete. Bytes go to a sink first, then the cursor moves, then the guest
is told that it may remove what was read: a daemon that dies between any two of these reads again what it already has,
and the sink's size tells it where to go on.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from mica.guest.agent import AgentRefusedError, GuestAgent, Request
from mica.guest.log import StreamEvents
from mica.guest.replies import FileRead
from mica.guest.spool import Cursor
from mica.model.errors import MicaError
from mica.model.units import KIB

MIN_READ = 16 * KIB
MAX_READ = 256 * KIB


class Sink(Protocol):
    """Where the bytes of one stream go, in order."""

    def position(self) -> int:
        """Bytes taken so far, of this daemon and of former ones."""

    def put(self, data: bytes) -> None: ...

    def load(self) -> Cursor: ...

    def save(self, cursor: Cursor) -> None: ...


class SegmentReader:
    """One stream of one command. ``prefix`` is the path of its segments up to their number, ``ack_path`` its FIFO."""

    def __init__(self, agent: GuestAgent, prefix: str, ack_path: str, window: int, sink: Sink) -> None:
        self._agent = agent
        self._prefix = prefix
        self._ack_path = ack_path
        self._window = window
        self._sink = sink
        cursor = sink.load()
        self._segment, self._base = cursor.segment, cursor.base
        self._stale = list(cursor.handles)
        self._handle: int | None = None
        self._ack_handle: int | None = None
        self._acked = 0
        self._resumed = self._segment > 0
        self._count = MIN_READ
        self.full = False

    @property
    def segment(self) -> int:
        return self._segment

    def exhausted(self, events: StreamEvents) -> bool:
        """Everything that the command wrote to this stream has been taken."""
        return events.ended is not None and self._segment >= events.ended

    @property
    def open(self) -> bool:
        return self._handle is not None

    def request(self) -> Request[FileRead]:
        assert self._handle is not None
        return self._agent.read_request(self._handle, self._count)

    async def open_segment(self) -> bool:
        """Open the present segment where reading stopped; false while the guest has not made it yet."""
        path = f"{self._prefix}.{self._segment}"
        requests: list[Request[Any]] = [self._agent.open_request(path)]
        requests += [self._agent.close_request(handle) for handle in self._stale]
        opened, *_ = await self._agent.batch(requests)
        self._stale.clear()
        if isinstance(opened, AgentRefusedError):
            if opened.absent_file:
                return False
            raise await self._agent.explain(opened) from opened
        offset = self._sink.position() - self._base
        if offset > 0:
            await self._agent.file_seek(opened, offset)
        self._handle = opened
        if self._segment or offset:
            self._save()
        return True

    def take(self, answer: FileRead | AgentRefusedError, complete: bool) -> bool:
        """Take what was read; ``complete``: before it was read, this segment could not grow any more.

        Returns whether there were bytes. Raises what the sink raises; then nothing was taken, and the same bytes come
        again after :meth:`forget`.
        """
        if isinstance(answer, AgentRefusedError):
            if answer.lost_handle:
                self.forget()
                return False
            raise answer
        self._agent.check_read(answer, self._count)
        if answer.count:
            try:
                self._sink.put(answer.buf_b64)
            except MicaError:
                self.drop()
                raise
        self.full = answer.count == self._count
        self._count = min(self._count * 2, MAX_READ) if self.full else MIN_READ
        if complete and answer.eof:
            self._segment += 1
            self._base = self._sink.position()
            self.drop()
            self._save()
        return answer.count > 0

    def drop(self) -> None:
        """Close the handle with the next request; what is read next is read by offset."""
        self.full = False
        if self._handle is not None:
            self._stale.append(self._handle)
            self._handle = None

    def forget(self) -> None:
        """The agent has forgotten its handles, or we do not know what it answered: go on by offset."""
        self._handle = self._ack_handle = None

    async def acknowledge(self) -> None:
        """Let the guest remove what was read: after half a window, and once after taking over from a former daemon."""
        due = self._resumed or self._segment - self._acked >= max(1, self._window // 2)
        if not due or self._segment <= self._acked:
            return
        if self._ack_handle is None:
            self._ack_handle = await self._agent.file_open(self._ack_path, "r+")
            self._save()
        word = f"{self._segment}\n".encode()
        written, flushed = await self._agent.batch(
            [self._agent.write_request(self._ack_handle, word), self._agent.flush_request(self._ack_handle)]
        )
        for answer in (written, flushed):
            if isinstance(answer, AgentRefusedError):
                self._ack_handle = None
                if answer.lost_handle:
                    return
                raise await self._agent.explain(answer) from answer
        self._acked, self._resumed = self._segment, False

    def _save(self) -> None:
        handles = tuple(h for h in (self._handle, self._ack_handle, *self._stale) if h is not None)
        self._sink.save(Cursor(self._segment, self._base, handles))

    async def close(self) -> None:
        """Give the agent its handles back; a guest that does not answer keeps them."""
        self.drop()
        if self._ack_handle is not None:
            self._stale.append(self._ack_handle)
            self._ack_handle = None
        stale, self._stale = self._stale, []
        if stale:
            with contextlib.suppress(MicaError):
                await self._agent.batch([self._agent.close_request(handle) for handle in stale])
