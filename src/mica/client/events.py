"""Server-sent events (HTML standard, section 9.2) that go on after a lost connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import httpx
import msgspec

from mica.client.transport import Transport, path_of, problem_error
from mica.model.errors import Code, MicaError
from mica.model.views import Event, VmPage

# The daemon sends a comment every 15 s, so a longer silence means that it is gone.
_SILENCE_S = 45.0
_RECONNECT_S = 60.0
_MAX_LINE = 16 * 1024**2


class Events:
    """``client.events``: call it for an iterator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def revision(self) -> int:
        """The present revision: events after it are what happens from now on."""
        page = await self._transport.request("GET", path_of("vms"), VmPage, params={"limit": 1})
        return page.revision

    async def __call__(
        self, since: int | None = None, *, reconnect_s: float = _RECONNECT_S
    ) -> AsyncGenerator[Event, None]:
        """Changes after revision ``since`` (from now on if ``None``), without end.

        A lost connection is taken up again where it ended, for up to ``reconnect_s`` seconds. Raises ``gone`` when
        ``since`` is older than what is kept (list anew and go on from there) and ``daemon-unreachable``.
        """
        after = await self.revision() if since is None else since
        down_since, pause = time.monotonic(), 0.1
        while True:
            try:
                async with aclosing(self._connected(after)) as events:
                    async for event in events:
                        if event is not None:
                            after = event.revision
                            yield event
                        down_since = 0.0  # connected
            except MicaError as error:
                lost = error.code in (Code.DAEMON_UNREACHABLE, Code.TIMEOUT)
                if not lost or (down_since and time.monotonic() > down_since + reconnect_s):
                    raise
            if not down_since:
                down_since, pause = time.monotonic(), 0.1
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)

    async def _connected(self, after: int) -> AsyncGenerator[Event | None, None]:
        """One connection: ``None`` once it stands, then its events."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        path = path_of("events")
        async with self._transport.stream(
            "GET", path, params={"since": after}, headers=headers, idle_s=_SILENCE_S
        ) as response:
            yield None
            kind, data = "", list[str]()
            async for line in _lines(response):
                if line.startswith("event:"):
                    kind = line[6:].strip()
                elif line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))
                elif not line and data:
                    if kind == "problem":
                        raise problem_error("\n".join(data).encode(), 200, "the stream of events")
                    yield _decode("\n".join(data))
                    kind, data = "", []


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines end with LF, CR or CRLF; only LF and CRLF are sent by Mica's daemon."""
    rest = b""
    async for chunk in response.aiter_raw():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE:
            raise MicaError(Code.TOO_LARGE, f"an event is longer than {_MAX_LINE} bytes")
        for line in lines:
            yield line.decode(errors="replace").removesuffix("\r")


def _decode(text: str) -> Event:
    try:
        return msgspec.json.decode(text, type=Event)
    except msgspec.DecodeError as error:
        raise MicaError(Code.INTERNAL, f"an event is not understood: {error}") from error
