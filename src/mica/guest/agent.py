"""The guest agent's commands, each with its types and its deadline.

Source of every command, argument and answer: QEMU's "QEMU Guest Agent Protocol Reference" (qemu-ga-ref). The agent
executes one command at a time, and the guest may forbid any of them by policy; ``info`` tells which.

Errors raised by all commands: ``agent-unavailable`` (nobody answers), ``agent-failed`` (the agent refused, or what it
said is not what the protocol allows; then the connection is closed and the next command opens a new one), ``timeout``
(it took longer than the command's deadline), ``busy`` (too many requests wait).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec

from mica.guest.channel import DEFAULT_REPLY_LIMIT, AgentChannel
from mica.guest.replies import (
    AgentInfo,
    ExecPid,
    ExecStatus,
    FileRead,
    FileSeek,
    FileSystem,
    FileWrite,
    GuestUser,
    HostName,
    NetworkInterface,
    OsInfo,
)
from mica.model.errors import Code, MicaError
from mica.model.units import MIB, Bytes

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 10.0
SHUTDOWN_GRACE_S = 3.0
DEFAULT_MAX_REPLY = Bytes(64 * MIB)

_PROTOCOL_ROOM = 4096  # JSON around a payload


class _Failure(msgspec.Struct, frozen=True):
    desc: str
    class_: str = msgspec.field(name="class", default="GenericError")


class _Reply(msgspec.Struct, Generic[T], frozen=True):
    result: T | msgspec.UnsetType = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Failure | None = None


class Request(msgspec.Struct, Generic[T], frozen=True):
    """One command for :meth:`GuestAgent.batch`: its name, arguments, the type and size limit of its answer."""

    command: str
    result: Any
    arguments: dict[str, Any] = {}
    limit: int = DEFAULT_REPLY_LIMIT


class AgentRefusedError(MicaError):
    """The agent answered a command with an error. ``desc`` is its own text, ``error_class`` its class."""

    def __init__(self, guest: str, command: str, error_class: str, desc: str) -> None:
        text = desc.replace("\n", " ").strip()[:500]
        super().__init__(
            Code.AGENT_FAILED,
            f"the agent of {guest} refused {command}: {text}",
            details={"command": command, "class": error_class[:100], "desc": text},
        )
        self.command, self.error_class, self.desc = command, error_class, text

    @property
    def absent_file(self) -> bool:
        return "No such file or directory" in self.desc

    @property
    def lost_handle(self) -> bool:
        """A handle that the agent does not have: it was restarted since."""
        return "has not been found" in self.desc and "andle" in self.desc

    @property
    def disabled(self) -> bool:
        """The command exists, and the guest's policy or a freeze forbids it."""
        return "has been disabled" in self.desc

    @property
    def unknown(self) -> bool:
        """The agent has no such command."""
        return self.error_class == "CommandNotFound" and not self.disabled


@lru_cache(maxsize=64)
def _decoder(result: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_Reply[result])


class GuestAgent:
    """The agent of one guest, behind the UNIX socket ``path`` of a QEMU chardev ``socket,server=on``.

    ``guest`` names the guest in messages. ``max_reply`` bounds the largest answer (file reads and captured output) in
    bytes; other answers are bounded to 1 MiB.
    """

    def __init__(
        self,
        path: Path,
        *,
        guest: str = "the guest",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_reply: Bytes = DEFAULT_MAX_REPLY,
    ) -> None:
        self.timeout_s = timeout_s
        self._max_reply = max_reply
        self._channel = AgentChannel(path, guest=guest)

    @property
    def guest(self) -> str:
        """What messages call the guest."""
        return self._channel.guest

    def called(self, guest: str) -> None:
        """Messages call the guest so from now on."""
        self._channel.guest = guest

    @property
    def ready(self) -> bool:
        """Synchronised with an agent that has answered; it may have gone since."""
        return self._channel.ready

    def port_opened(self) -> None:
        """The guest opened the agent's port (QMP ``VSERPORT_CHANGE``): whoever waits tries at once."""
        self._channel.port_opened()

    def port_closed(self) -> None:
        """The guest closed the agent's port: commands under way fail with ``agent-unavailable``."""
        self._channel.port_closed()

    def moved(self, path: Path) -> None:
        """The guest goes on in another process, behind the socket ``path``."""
        self._channel.moved(path)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return as soon as the agent answers. Raises ``agent-unavailable`` after ``timeout_s``."""
        await self._channel.wait_ready(timeout_s)

    async def close(self) -> None:
        """Close the connection; commands under way fail."""
        await self._channel.close()

    async def batch(self, requests: Sequence[Request[Any]], *, timeout_s: float | None = None) -> list[Any]:
        """Send commands together and return their results in order, a refused one as :class:`AgentRefusedError`.

        The agent executes them one after the other; a refusal does not stop those behind it.
        """
        deadline = asyncio.get_running_loop().time() + (self.timeout_s if timeout_s is None else timeout_s)
        lines = await self._channel.request(
            [msgspec.json.encode({"execute": r.command, "arguments": r.arguments}) + b"\n" for r in requests],
            limit=min(sum(r.limit for r in requests), self._max_reply),
            deadline=deadline,
            command=requests[0].command,
        )
        return [self._decode(r, line) for r, line in zip(requests, lines, strict=True)]

    async def call(self, request: Request[T], *, timeout_s: float | None = None) -> T:
        """Send one command and return its result. Raises :class:`AgentRefusedError` where it was refused."""
        (result,) = await self.batch([request], timeout_s=timeout_s)
        if isinstance(result, AgentRefusedError):
            raise await self.explain(result) from result
        return cast("T", result)

    def _decode(self, request: Request[Any], line: bytes) -> Any:
        try:
            reply = _decoder(request.result).decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._channel.reject(
                f"answered {request.command} with what is not an answer to it", command=request.command
            ) from error
        if reply.error is not None:
            return AgentRefusedError(self.guest, request.command, reply.error.class_, reply.error.desc)
        if reply.result is msgspec.UNSET:
            raise self._channel.reject(f"answered {request.command} with nothing", command=request.command)
        return reply.result

    async def explain(self, refusal: AgentRefusedError) -> MicaError:
        """Say why a command is forbidden: by the guest's policy, or because its file systems are frozen."""
        if refusal.unknown:
            return self._policy(refusal, f"the agent of {self.guest} is too old for {refusal.command}", "update it")
        if not refusal.disabled:
            return refusal
        frozen = "frozen" in refusal.desc
        if not frozen and not refusal.command.startswith("guest-fsfreeze"):
            try:
                frozen = await self.fsfreeze_status() == "frozen"
            except MicaError as error:
                refusal.add_note(f"asking whether the guest is frozen failed: {error}")
        if frozen:
            return MicaError(
                Code.AGENT_FAILED,
                f"the file systems of {self.guest} are frozen: its agent refuses {refusal.command} until they thaw",
                hint="wait until the snapshot that froze them is done",
                retryable=True,
                details={"command": refusal.command, "frozen": True},
            )
        return self._policy(
            refusal,
            f"the policy of {self.guest} forbids {refusal.command}",
            "allow it in the guest: in /etc/qemu/qemu-ga.conf or /etc/sysconfig/qemu-ga, "
            "take it out of block-rpcs or add it to allow-rpcs",
        )

    def _policy(self, refusal: AgentRefusedError, message: str, hint: str) -> MicaError:
        details = {"command": refusal.command, "disabled": refusal.disabled, "desc": refusal.desc}
        return MicaError(Code.AGENT_FAILED, message, hint=hint, details=details)

    async def _simple(self, command: str, result: type[T], timeout_s: float | None = None, **arguments: Any) -> T:
        return await self.call(Request[T](command, result, arguments), timeout_s=timeout_s)

    # What the guest is

    async def ping(self, *, timeout_s: float | None = None) -> None:
        await self._simple("guest-ping", dict, timeout_s)

    async def info(self) -> AgentInfo:
        """The agent's version, and which commands it has and may execute."""
        return await self._simple("guest-info", AgentInfo)

    async def osinfo(self) -> OsInfo:
        return await self._simple("guest-get-osinfo", OsInfo)

    async def hostname(self) -> str:
        return (await self._simple("guest-get-host-name", HostName)).host_name

    async def network_interfaces(self) -> tuple[NetworkInterface, ...]:
        return await self._simple("guest-network-get-interfaces", cast("type[Any]", tuple[NetworkInterface, ...]))

    async def users(self) -> tuple[GuestUser, ...]:
        """Users with a session in the guest."""
        return await self._simple("guest-get-users", cast("type[Any]", tuple[GuestUser, ...]))

    async def filesystems(self) -> tuple[FileSystem, ...]:
        return await self._simple("guest-get-fsinfo", cast("type[Any]", tuple[FileSystem, ...]))

    async def time(self) -> float:
        """The guest's clock, Unix time in seconds."""
        return await self._simple("guest-get-time", int) / 1e9

    async def set_time(self, unix_time_s: float | None) -> None:
        """Set the guest's clock; ``None`` sets it from the guest's own hardware clock."""
        arguments = {} if unix_time_s is None else {"time": round(unix_time_s * 1e9)}
        await self._simple("guest-set-time", dict, **arguments)

    # Power and file systems

    async def shutdown(self, mode: str = "powerdown") -> None:
        """Ask the guest to end; ``mode`` is ``powerdown``, ``halt`` or ``reboot``.

        A guest that obeys does not answer, so silence is success, and so is a connection that ends. Raises
        ``agent-unavailable`` when there was nobody to ask, ``agent-failed`` when the guest refused.
        """
        await self.wait_ready(self.timeout_s)
        try:
            await self._simple("guest-shutdown", dict, SHUTDOWN_GRACE_S, mode=mode)
        except MicaError as error:
            if error.code not in (Code.TIMEOUT, Code.AGENT_UNAVAILABLE):
                raise

    async def fsfreeze_status(self) -> str:
        """``thawed`` or ``frozen``."""
        return await self._simple("guest-fsfreeze-status", str)

    async def fsfreeze(self, *, timeout_s: float = 30.0) -> int:
        """Flush and freeze all local file systems; returns how many. Thaw them soon: the guest stands still."""
        return await self._simple("guest-fsfreeze-freeze", int, timeout_s)

    async def fsthaw(self, *, timeout_s: float = 30.0) -> int:
        """Thaw what is frozen; returns how many file systems."""
        return await self._simple("guest-fsfreeze-thaw", int, timeout_s)

    async def fstrim(self, *, timeout_s: float = 300.0) -> None:
        """Tell the storage below which blocks are unused."""
        await self._simple("guest-fstrim", dict, timeout_s)

    # Processes and files

    async def exec_raw(
        self,
        path: str,
        arguments: Sequence[str] = (),
        *,
        env: Sequence[str] | None = None,
        capture: bool = True,
        stdin: bytes | None = None,
    ) -> int:
        """Start a program as the agent's own user and return its pid; ``env`` replaces the environment (``A=b``)."""
        request: dict[str, Any] = {"path": path, "arg": list(arguments), "capture-output": capture}
        if env is not None:
            request["env"] = list(env)
        if stdin is not None:
            request["input-data"] = stdin
        return (await self.call(Request[ExecPid]("guest-exec", ExecPid, request))).pid

    def status_request(self, pid: int, *, limit: int | None = None) -> Request[ExecStatus]:
        return Request("guest-exec-status", ExecStatus, {"pid": pid}, limit or self._max_reply)

    async def exec_status(self, pid: int) -> ExecStatus:
        """What has become of a process. Says ``exited`` once; asking again is refused."""
        return await self.call(self.status_request(pid))

    async def exec_wait(self, pid: int, *, timeout_s: float) -> ExecStatus:
        """Ask until the process has ended. Raises ``timeout``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause = 0.001
        while not (status := await self.exec_status(pid)).exited:
            if loop.time() >= deadline:
                raise MicaError(
                    Code.TIMEOUT, f"process {pid} in {self.guest} did not end within {timeout_s:g} s", retryable=True
                )
            await asyncio.sleep(pause)  # the agent has no way to tell
            pause = min(pause * 1.5, 0.1)
        return status

    async def file_open(self, path: str, mode: str = "r") -> int:
        """Open a file in the guest (modes of fopen(3)); non-blocking, so that a FIFO can be opened. A handle."""
        return await self.call(self.open_request(path, mode))

    def open_request(self, path: str, mode: str = "r") -> Request[int]:
        return Request("guest-file-open", int, {"path": path, "mode": mode})

    def read_request(self, handle: int, count: int) -> Request[FileRead]:
        arguments = {"handle": handle, "count": count}
        return Request("guest-file-read", FileRead, arguments, count * 4 // 3 + _PROTOCOL_ROOM)

    def write_request(self, handle: int, data: bytes) -> Request[FileWrite]:
        return Request("guest-file-write", FileWrite, {"handle": handle, "buf-b64": data})

    def flush_request(self, handle: int) -> Request[dict[str, Any]]:
        return Request("guest-file-flush", dict, {"handle": handle})

    def close_request(self, handle: int) -> Request[dict[str, Any]]:
        return Request("guest-file-close", dict, {"handle": handle})

    async def file_read(self, handle: int, count: int, *, timeout_s: float | None = None) -> FileRead:
        """Read at most ``count`` bytes. ``eof`` says that the end was reached; a file may still grow after it."""
        read = await self.call(self.read_request(handle, count), timeout_s=timeout_s)
        return self.check_read(read, count)

    def check_read(self, read: FileRead, count: int) -> FileRead:
        """Refuse an answer that says one length and has another, or has more than was asked for."""
        if read.count != len(read.buf_b64) or read.count > count:
            raise self._channel.reject(
                f"said it read {read.count} bytes of {count} and sent {len(read.buf_b64)}", command="guest-file-read"
            )
        return read

    async def file_write(self, handle: int, data: bytes, *, timeout_s: float | None = None) -> None:
        """Write all of ``data``. Raises ``agent-failed`` when the guest wrote less (its disk is full, for example)."""
        written = await self.call(self.write_request(handle, data), timeout_s=timeout_s)
        if written.count != len(data):
            raise MicaError(
                Code.AGENT_FAILED,
                f"{self.guest} wrote {written.count} of {len(data)} bytes",
                details={"command": "guest-file-write", "written": written.count, "wanted": len(data)},
            )

    def seek_request(self, handle: int, offset: int) -> Request[FileSeek]:
        return Request("guest-file-seek", FileSeek, {"handle": handle, "offset": offset, "whence": "set"})

    async def file_seek(self, handle: int, offset: int) -> int:
        """Move to ``offset`` from the beginning; returns the position."""
        return (await self.call(self.seek_request(handle, offset))).position

    async def file_flush(self, handle: int) -> None:
        await self.call(self.flush_request(handle))

    async def file_close(self, handle: int) -> None:
        await self.call(self.close_request(handle))
