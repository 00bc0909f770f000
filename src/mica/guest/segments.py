"""Reading one stream of a command from its segments in the guest, each byte once.

Bytes go to a sink first, then the cursor moves, then the guest is told that it may remove what was read: a daemon that
dies between any two of these reads again what it already has, and the sink's size tells it where to go on.
"""

from __future__ import annotations

from typing import Any, Protocol

from mica.guest.agent import AgentRefusedError, GuestAgent
from mica.guest.log import StreamEvents
from mica.guest.spool import Cursor
from mica.guest.tail import Tail, open_tails
from mica.model.errors import MicaError


class Sink(Protocol):
    """Where the bytes of one stream go, in order."""

    def position(self) -> int:
        """Bytes taken so far, of this daemon and of former ones."""

    def put(self, data: bytes) -> None: ...

    def load(self) -> Cursor: ...

    def save(self, cursor: Cursor) -> None: ...


class SegmentReader:
    """One stream of one command.

    ``first`` is segment 0, which the runner keeps open and which begins for this command at offset ``start``;
    ``ack_path`` is the FIFO by which the pump is told what was read, ``window`` how much it leaves unread.
    """

    def __init__(self, agent: GuestAgent, first: Tail, start: int, ack_path: str, window: int, sink: Sink) -> None:
        self._agent = agent
        self._stem = first.path.removesuffix("0")
        self._ack_path = ack_path
        self._window = window
        self._sink = sink
        cursor = sink.load()
        self._segment, self._base = cursor.segment, cursor.base
        self._closing = list(cursor.handles)
        self._ack_handle: int | None = None
        self._acked = 0
        self._resumed = self._segment > 0
        inside = sink.position() - self._base
        if self._segment == 0:
            self._tail = first
            if first.offset != start + inside:
                first.drop()
                first.offset = start + inside
        else:
            self._tail = Tail(agent, f"{self._stem}{self._segment}", inside)

    @property
    def tail(self) -> Tail:
        """What to read now."""
        return self._tail

    @property
    def segment(self) -> int:
        return self._segment

    def exhausted(self, events: StreamEvents) -> bool:
        """Everything that the command wrote to this stream has been taken."""
        return events.ended is not None and self._segment >= events.ended

    async def open(self) -> bool:
        """Open the present segment; false while the guest has not made it yet."""
        fresh = not self._tail.open
        opened = await open_tails(self._agent, [self._tail])
        if opened and fresh and self._segment:
            self._save()
        return opened

    def take(self, answer: Any, complete: bool) -> bool:
        """Take what was read; ``complete``: before it was read, this segment could not grow any more for us.

        Returns whether there were bytes. Raises what the sink raises; then nothing was taken, and the same bytes come
        again.
        """
        data, eof = self._tail.look(answer)
        if data:
            try:
                self._sink.put(data)
            except MicaError:
                self._tail.drop()
                raise
        self._tail.advance(len(data))
        if complete and eof:
            self._next()
        return bool(data)

    def _next(self) -> None:
        if self._segment:
            self._closing += self._tail.leftovers()
        self._segment += 1
        self._base = self._sink.position()
        self._tail = Tail(self._agent, f"{self._stem}{self._segment}")

    async def advance(self, events: StreamEvents) -> None:
        """After :meth:`take`: remember where we are, and let the guest remove what was read.

        It is told after half a window, and once after taking over from a former daemon, which may not have told it.
        """
        if self.exhausted(events) or self._segment == 0:
            return
        due = self._resumed or self._segment - self._acked >= max(1, self._window // 2)
        if not due or self._segment <= self._acked:
            return
        if self._ack_handle is None:
            self._ack_handle = await self._agent.file_open(self._ack_path, "r+")
        self._save()
        word = f"{self._segment}\n".encode()
        closing, self._closing = self._closing, []
        answers = await self._agent.batch(
            [
                self._agent.write_request(self._ack_handle, word),
                self._agent.flush_request(self._ack_handle),
                *(self._agent.close_request(handle) for handle in closing),
            ]
        )
        for answer in answers[:2]:
            if isinstance(answer, AgentRefusedError):
                self._ack_handle = None
                if answer.lost_handle:
                    return
                raise await self._agent.explain(answer) from answer
        self._acked, self._resumed = self._segment, False

    def _save(self) -> None:
        handles = (self._tail.handle, self._ack_handle, *self._closing)
        self._sink.save(Cursor(self._segment, self._base, tuple(h for h in handles if h is not None)))

    def forget(self) -> None:
        """We do not know what the agent answered: go on by offset."""
        self._tail.drop()

    def leftovers(self) -> list[int]:
        """Handles to give back to the agent when reading is over; segment 0 stays open for the next command."""
        if self._segment:
            self._closing += self._tail.leftovers()
        handles = [*self._closing, *([self._ack_handle] if self._ack_handle is not None else [])]
        self._closing, self._ack_handle = [], None
        return handles
