"""A guest agent without a guest: speaks qemu-ga's protocol on a UNIX socket and runs real local processes and files.

It keeps the habits of the real one that matter (QEMU's qga): one request after the other, ``guest-exec-status``
forgets a process once it has said that it ended, files are opened non-blocking and written through a buffer, data read
from a FIFO before it would block is lost, and what arrives before the guest opens its port is dropped. And it lies on
request: see :class:`Misbehaviour`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from mica.host.processes import find, reference
from mica.testing.agent_files import AgentFiles, RefusedError

_FREEZE_SAFE = frozenset(
    {
        "guest-ping",
        "guest-info",
        "guest-sync",
        "guest-sync-delimited",
        "guest-fsfreeze-status",
        "guest-fsfreeze-thaw",
    }
)


class Misbehaviour(StrEnum):
    """What a command does instead of answering."""

    HANG = "hang"
    NOT_JSON = "not-json"
    WRONG_TYPE = "wrong-type"
    EMPTY_OBJECT = "empty-object"
    UNASKED = "unasked"  # the right answer, and another one that nobody asked for
    NEVER_ENDING_LINE = "never-ending-line"
    FLOOD = "flood"
    HUGE = "huge"
    HANG_UP = "hang-up"
    DEEP = "deep"


class _Process:
    def __init__(self, process: asyncio.subprocess.Process, stdin: bytes | None) -> None:
        self.process = process
        self.stdin = stdin
        self.out = b""
        self.err = b""
        self.task = asyncio.get_running_loop().create_task(self._collect())

    async def _collect(self) -> None:
        self.out, self.err = await self.process.communicate(self.stdin)


class FakeAgent:
    """Serve as ``async with FakeAgent(path) as agent``; what it started is killed at the end.

    ``policy`` names commands that are forbidden. ``calls`` records the commands it was given, in order. ``sh`` false
    makes every program that is a shell unfindable, ``hidden`` names others, ``shell`` stands in for ``/bin/sh``.
    """

    def __init__(self, path: Path, *, policy: frozenset[str] = frozenset(), sh: bool = True) -> None:
        self.path = path
        self.calls: list[str] = []
        self.shut_down: str | None = None
        self.frozen = False
        self.delay_s = 0.0
        self.policy = policy
        self._sh = sh
        self.hidden: frozenset[str] = frozenset()
        self.shell = "/bin/sh"
        self._port_open = True
        self._misbehaviour: dict[str, Misbehaviour] = {}
        self._files = AgentFiles()
        self._processes: dict[int, _Process] = {}
        self._left: dict[int, _Process] = {}
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._delimit = False
        self._commands: dict[str, Callable[[dict[str, Any]], Any]] = {
            "guest-sync-delimited": self._sync,
            "guest-ping": lambda _: {},
            "guest-info": self._info,
            "guest-get-osinfo": lambda _: {"id": "fake", "pretty-name": "Fake 1", "kernel-release": "1.2.3"},
            "guest-get-host-name": lambda _: {"host-name": "fake"},
            "guest-network-get-interfaces": self._interfaces,
            "guest-get-users": lambda _: [{"user": "root", "login-time": 1.5}],
            "guest-get-fsinfo": lambda _: [{"name": "vda", "mountpoint": "/", "type": "ext4", "disk": []}],
            "guest-get-time": lambda _: time.time_ns(),
            "guest-set-time": lambda _: {},
            "guest-shutdown": self._shutdown,
            "guest-fsfreeze-status": lambda _: "frozen" if self.frozen else "thawed",
            "guest-fsfreeze-freeze": self._freeze,
            "guest-fsfreeze-thaw": self._thaw,
            **self._files.commands,
        }

    async def __aenter__(self) -> FakeAgent:
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=64 * 1024**2)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        await self.restart()

    def misbehave(self, command: str, how: Misbehaviour | None) -> None:
        """From now on ``command`` does ``how``; ``None`` ends it."""
        if how is None:
            self._misbehaviour.pop(command, None)
        else:
            self._misbehaviour[command] = how

    def open_port(self) -> None:
        self._port_open = True

    def close_port(self) -> None:
        """As before the guest has booted: everything that arrives is dropped."""
        self._port_open = False

    def drop_connections(self) -> None:
        """As when QEMU goes away."""
        for writer in list(self._writers):
            writer.transport.abort()

    def forget(self) -> None:
        """As when only the agent is restarted: handles and processes are forgotten, the processes live on."""
        self._files.forget()
        self._left.update(self._processes)
        self._processes = {}

    async def restart(self) -> None:
        """As when the guest restarts: every process dies, every handle is forgotten."""
        self.forget()
        for process in self._left.values():
            pid = process.process.pid
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                process.process.kill()
            await process.process.wait()
            process.task.cancel()
            await asyncio.gather(process.task, return_exceptions=True)
        self._left.clear()
        self._end_daemons()

    def _end_daemons(self) -> None:
        """What commands left behind and nobody waits for, known by the directory that it works in: the socket's."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                ref, cwd = reference(int(entry.name)), Path(os.readlink(entry / "cwd"))
                if ref is None or ref.pid == os.getpid() or not cwd.is_relative_to(self.path.parent):
                    continue
                if (found := find(ref)) is not None:
                    with found:
                        found.kill()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                if not self._port_open:
                    continue
                await self._one(line.lstrip(b"\xff"), writer)
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _one(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = msgspec.json.decode(line)
            command, arguments = request["execute"], request.get("arguments", {})
        except (msgspec.MsgspecError, KeyError, TypeError):
            writer.write(b'{"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}}\n')
            return
        self.calls.append(command)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        how = self._misbehaviour.get(command)
        if how is not None and not await self._lie(how, writer):
            return
        try:
            answer: dict[str, Any] = {"return": await self._dispatch(command, arguments)}
        except RefusedError as refused:
            answer = {"error": {"class": refused.error_class, "desc": refused.desc}}
        if answer == {"return": None}:
            return
        mark, self._delimit = (b"\xff" if self._delimit else b""), False
        writer.write(mark + msgspec.json.encode(answer) + b"\n")
        if how is Misbehaviour.UNASKED:
            writer.write(b'{"return": {}}\n')
        await writer.drain()

    async def _lie(self, how: Misbehaviour, writer: asyncio.StreamWriter) -> bool:
        """Do it; true where the right answer follows."""
        if how is Misbehaviour.UNASKED:
            return True
        if how is Misbehaviour.HANG_UP:
            writer.transport.abort()
        elif how is Misbehaviour.FLOOD:
            while True:
                writer.write(b"\x00garbage" * 8192)
                await writer.drain()
        elif how is not Misbehaviour.HANG:
            writer.write(_LIES[how])
            await writer.drain()
        return False

    async def _dispatch(self, command: str, arguments: dict[str, Any]) -> Any:
        if command in self.policy:
            raise RefusedError(f"Command {command} has been disabled: the command is not allowed", "CommandNotFound")
        if self.frozen and command not in _FREEZE_SAFE:
            raise RefusedError(f"Command {command} has been disabled: the agent is in frozen state", "CommandNotFound")
        if command == "guest-exec":
            return await self._exec(arguments)
        if command == "guest-exec-status":
            return await self._exec_status(arguments)
        if command not in self._commands:
            raise RefusedError(f"The command {command} has not been found", "CommandNotFound")
        return self._commands[command](arguments)

    def _sync(self, arguments: dict[str, Any]) -> int:
        self._delimit = True
        return int(arguments["id"])

    def _info(self, _: dict[str, Any]) -> dict[str, Any]:
        names = [*self._commands, "guest-exec", "guest-exec-status"]
        commands = [{"name": n, "enabled": n not in self.policy, "success-response": True} for n in names]
        return {"version": "0.0.fake", "supported_commands": commands}

    def _interfaces(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        address = {"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}
        return [{"name": "lo", "ip-addresses": [address], "statistics": {"rx-bytes": 1}}]

    def _shutdown(self, arguments: dict[str, Any]) -> None:
        self.shut_down = arguments.get("mode", "powerdown")

    def _freeze(self, _: dict[str, Any]) -> int:
        self.frozen = True
        return 1

    def _thaw(self, _: dict[str, Any]) -> int:
        self.frozen = False
        return 1

    async def _exec(self, arguments: dict[str, Any]) -> dict[str, Any]:
        path, capture = arguments["path"], bool(arguments.get("capture-output"))
        path, *words = [self.shell if word == "/bin/sh" else word for word in (path, *arguments.get("arg", []))]
        env = dict(item.partition("=")[::2] for item in arguments["env"]) if "env" in arguments else None
        sink = asyncio.subprocess.PIPE if capture else asyncio.subprocess.DEVNULL
        stdin = msgspec.convert(arguments["input-data"], bytes) if "input-data" in arguments else None
        try:
            if path in self.hidden or (not self._sh and path.endswith("/sh")):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            process = await asyncio.create_subprocess_exec(
                path,
                *words,
                stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env=env,
                cwd="/",
            )
        except OSError as error:
            reason = f"Failed to execute child process “{path}” ({os.strerror(error.errno or 0)})"
            raise RefusedError(f"Guest agent command failed, error was '{reason}'") from error
        self._processes[process.pid] = _Process(process, stdin)
        return {"pid": process.pid}

    async def _exec_status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        known = self._processes.get(arguments["pid"])
        if known is None:
            raise RefusedError(f"Invalid parameter 'pid': PID {arguments['pid']} does not exist")
        if not known.task.done():
            return {"exited": False}
        await known.task
        del self._processes[arguments["pid"]]
        code = known.process.returncode
        assert code is not None
        answer: dict[str, Any] = {"exited": True}
        answer["signal" if code < 0 else "exitcode"] = abs(code)
        if known.out:
            answer["out-data"] = known.out
        if known.err:
            answer["err-data"] = known.err
        return answer

    @property
    def open_handles(self) -> int:
        """File handles that nobody has closed."""
        return self._files.open


_LIES = {
    Misbehaviour.NOT_JSON: b"I am not JSON\n",
    Misbehaviour.WRONG_TYPE: b'{"return": [1, {"pid": "x", "exited": "maybe", "count": -1}]}\n',
    Misbehaviour.EMPTY_OBJECT: b"{}\n",
    Misbehaviour.NEVER_ENDING_LINE: b'{"return": "' + b"a" * (2 * 1024**2),
    Misbehaviour.HUGE: b'{"return": "' + b"a" * (2 * 1024**2) + b'"}\n',
    Misbehaviour.DEEP: b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
}
