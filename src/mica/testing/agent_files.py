"""The files of the guest agent without a guest, and how it refuses: see :mod:`mica.testing.agent_server`."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

import msgspec

_BUFFER = 4096
_OPEN_FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
}


class RefusedError(Exception):
    """Becomes the protocol's error answer."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc, self.error_class = desc, error_class


class _File:
    """A handle with the habits of C stdio on a non-blocking descriptor."""

    def __init__(self, path: str, mode: str) -> None:
        flags = _OPEN_FLAGS.get(mode.replace("b", ""))
        if flags is None:
            raise RefusedError(f"invalid file open mode '{mode}'")
        try:
            self.fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RefusedError(
                f"failed to open file '{path}' (mode: '{mode}'): {os.strerror(error.errno or 0)}"
            ) from error
        self.fifo = stat.S_ISFIFO(os.fstat(self.fd).st_mode)
        self._pending = bytearray()

    def read(self, count: int) -> tuple[bytes, bool]:
        data = bytearray()
        while len(data) < count:
            try:
                piece = os.read(self.fd, count - len(data))
            except BlockingIOError as error:
                raise RefusedError("failed to read file: Resource temporarily unavailable") from error
            if not piece:
                return bytes(data), True
            data += piece
        return bytes(data), False

    def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        pending, self._pending = bytes(self._pending), bytearray()
        while pending:
            try:
                pending = pending[os.write(self.fd, pending) :]
            except OSError as error:
                raise RefusedError(f"failed to write to file: {os.strerror(error.errno or 0)}") from error

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self.fd)


class AgentFiles:
    """Handles, and the commands that work on them: ``guest-file-*``."""

    def __init__(self) -> None:
        self._open: dict[int, _File] = {}
        self._next_handle = 1000
        self.commands: dict[str, Callable[[dict[str, Any]], Any]] = {
            "guest-file-open": self._open_file,
            "guest-file-read": self._read,
            "guest-file-write": self._write,
            "guest-file-seek": self._seek,
            "guest-file-flush": self._flush,
            "guest-file-close": self._close_file,
        }

    @property
    def open(self) -> int:
        """How many handles nobody has closed."""
        return len(self._open)

    def forget(self) -> None:
        """Close them all, and lose what was not written through."""
        for file in self._open.values():
            os.close(file.fd)
        self._open.clear()

    def _handle(self, arguments: dict[str, Any]) -> _File:
        handle = arguments["handle"]
        if handle not in self._open:
            raise RefusedError(f"handle '{handle}' has not been found")
        return self._open[handle]

    def _open_file(self, arguments: dict[str, Any]) -> int:
        file = _File(arguments["path"], arguments.get("mode", "r"))
        self._next_handle += 1
        self._open[self._next_handle] = file
        return self._next_handle

    def _read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        data, eof = self._handle(arguments).read(arguments.get("count", _BUFFER))
        return {"count": len(data), "eof": eof, **({"buf-b64": data} if data else {})}

    def _write(self, arguments: dict[str, Any]) -> dict[str, Any]:
        file = self._handle(arguments)
        data = msgspec.convert(arguments["buf-b64"], bytes)
        file.write(data)
        return {"count": len(data), "eof": False}

    def _seek(self, arguments: dict[str, Any]) -> dict[str, Any]:
        file = self._handle(arguments)
        return {"position": os.lseek(file.fd, arguments["offset"], os.SEEK_SET), "eof": False}

    def _flush(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._handle(arguments).flush()
        return {}

    def _close_file(self, arguments: dict[str, Any]) -> dict[str, Any]:
        file = self._handle(arguments)
        del self._open[arguments["handle"]]
        file.close()
        return {}
