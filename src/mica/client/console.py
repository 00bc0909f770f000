"""A VM's serial console: history first, then live, both ways."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from mica.client.link import Link
from mica.client.transport import Transport, path_of

_HEADER = 8


class Console:
    """An open console, as an asynchronous context manager and an iterator over what the guest writes.

    Several may watch and type at once. ``offset`` counts the bytes of the console's history up to what was read last,
    ``missed`` those that were gone before they could be read. A lost connection is taken up again without a gap.
    """

    def __init__(self, transport: Transport, vm: str, offset: int | None) -> None:
        self.offset = offset
        self.missed = 0
        self._link = Link(transport, path_of("vms", vm, "console"), lambda: {"offset": self.offset})

    async def __aenter__(self) -> Self:
        await self._link.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._link.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes, as the guest wrote them. Ends when the daemon ends it."""
        while True:
            frame = await self._link.receive()
            if frame is None:
                raise StopAsyncIteration
            data = self._accept(frame if isinstance(frame, bytes) else b"")
            if data:
                return data

    def _accept(self, frame: bytes) -> bytes:
        """Frames are the offset of their first byte (8 bytes, big-endian) and data."""
        at, data = int.from_bytes(frame[:_HEADER], "big"), frame[_HEADER:]
        if self.offset is not None:
            if at < self.offset:
                data = data[self.offset - at :]
                at = self.offset
            self.missed += at - self.offset
        self.offset = at + len(data)
        return data

    async def write(self, data: bytes) -> None:
        """Type ``data``. Raises ``timeout`` when the daemon takes nothing for a minute."""
        await self._link.send(data, again=True)
