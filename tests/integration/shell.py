"""A root shell in a guest, over its serial console: what ``micro`` offers without its agent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from mica.client.console import Console
from mica.client.handle import VmHandle


class Shell:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = 0
        self._token = secrets.token_hex(4)
        self._count = 0
        self._rest = ""

    async def until(self, mark: str, timeout_s: float = 60.0) -> str:
        """What the guest writes up to and with ``mark``, carriage returns left out. Raises ``TimeoutError``."""
        text, self._rest = self._rest, ""
        async with asyncio.timeout(timeout_s):
            while mark not in text:
                data = await anext(self.console, None)
                assert data is not None, f"the console ended before {mark!r}:\n{text}"
                text += data.decode(errors="replace").replace("\r", "")
        found, _, self._rest = text.partition(mark)
        return found + mark

    async def enter(self, timeout_s: float = 90.0) -> None:
        """Wait until somebody reads, then read line by line: no prompt, no echo, no editing."""
        # Halves, so that no echo of what is typed looks like the answer.
        hello = f"\nprintf 'here-%s\\n' {self._token}\n".encode()
        async with asyncio.timeout(timeout_s):
            while True:
                await self.console.write(hello)
                with suppress(TimeoutError):
                    await self.until(f"here-{self._token}\n", timeout_s=3)
                    break
        loop = (
            f"stty -echo; printf 'loop-%s\\n' {self._token}; while read -r line; do eval \"$line\"; done; stty echo\n"
        )
        await self.console.write(loop.encode())
        await self.until(f"loop-{self._token}\n", timeout_s)

    async def leave(self) -> None:
        await self.console.write(b"break\n")

    async def run(self, command: str, timeout_s: float = 60.0) -> str:
        """The output of a command. Its exit status is in :attr:`status`."""
        self._count += 1
        end = f"{self._token}-{self._count}"
        # Halves again: when this is typed, the shell may still be editing.
        half, rest = end[:4], end[4:]
        line = f"printf '\\n%s%s:begin\\n' {half} {rest}; {command}; printf '\\n%s%s:end:%s.\\n' {half} {rest} $?\n"
        await self.console.write(line.encode())
        await self.until(f"{end}:begin\n", timeout_s)
        body = (await self.until(f"\n{end}:end:", timeout_s)).removesuffix(f"\n{end}:end:")
        self.status = int((await self.until(".\n", timeout_s)).removesuffix(".\n"))
        return body.strip("\n")


@asynccontextmanager
async def shell(vm: VmHandle) -> AsyncIterator[Shell]:
    """The shell of a running guest; where its history is long, only what comes from now on is read."""
    async with vm.console() as console:
        guest = Shell(console)
        await guest.enter()
        yield guest
        await guest.leave()
