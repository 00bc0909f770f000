"""Standard input as it comes, and a terminal in raw mode."""

from __future__ import annotations

import asyncio
import os
import select
import stat
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

_CHUNK = 32 * 1024


def is_given(fd: int | None) -> bool:
    """Whether somebody gives input on purpose: a pipe, a file or a socket, but no terminal and not ``/dev/null``."""
    if fd is None:
        return False
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


async def chunks(fd: int) -> AsyncIterator[bytes]:
    """What can be read from ``fd``, until its end. Never blocks the loop, and leaves no thread behind."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # a file or /dev/null: always ready, and epoll(7) takes none
        while data := os.read(fd, _CHUNK):
            yield data
            # Others must get their turn between the chunks of a large file.
            await asyncio.sleep(0)
        return
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    try:
        while True:
            await ready.wait()
            ready.clear()
            # The loop may tell of the same bytes twice, and a read without any would block.
            if not poller.poll(0):
                continue
            try:
                data = os.read(fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:  # EIO: the terminal has gone
                return
            if not data:
                return
            yield data
    finally:
        loop.remove_reader(fd)


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Every key as it is pressed, nothing echoed (termios(3), cfmakeraw); as it was before, whatever happens."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class EscapeKeys:
    """Finds what is meant for us in what is typed: Ctrl-] and then a key.

    ``feed`` returns what goes to the guest and the command keys that came, in order.
    """

    ESCAPE = 0x1D

    def __init__(self) -> None:
        self._pending = False

    def feed(self, data: bytes) -> tuple[bytes, str]:
        """``Ctrl-] Ctrl-]`` is one Ctrl-] for the guest; an unknown key after Ctrl-] is a request for help."""
        out, commands = bytearray(), ""
        for byte in data:
            if self._pending:
                self._pending = False
                if byte == self.ESCAPE:
                    out.append(byte)
                else:
                    commands += chr(byte).lower()
            elif byte == self.ESCAPE:
                self._pending = True
            else:
                out.append(byte)
        return bytes(out), commands
