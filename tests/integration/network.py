"""Small servers and clients on both sides of a guest's network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.integration.shell import Shell


async def online(guest: Shell) -> None:
    """Wait until the guest has its address: nothing in it waits for that."""
    await guest.run("until ip route | grep -q default; do usleep 100000; done")


async def serve(guest: Shell, port: int, text: str) -> None:
    """Make the guest answer HTTP requests to ``port`` with ``text``."""
    await online(guest)
    await guest.run(f"mkdir -p /srv/{port}; echo '{text}' > /srv/{port}/index.html; httpd -p {port} -h /srv/{port}")


async def _get(host: str, port: int) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        return (await reader.read()).decode().partition("\r\n\r\n")[2].strip()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def fetch(port: int, host: str = "127.0.0.1", timeout_s: float = 20.0) -> str:
    """What a web server answers, asked again until it does."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                # A published port takes connections before the guest listens, and they lead nowhere.
                async with asyncio.timeout(3):
                    if text := await _get(host, port):
                        return text
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def greeter(host: str, text: str = "hello from the host") -> AsyncIterator[int]:
    """A server on the host that greets whoever connects; its port."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{text}\n".encode())
        writer.close()

    async with await asyncio.start_server(greet, host, 0) as server:
        yield server.sockets[0].getsockname()[1]
