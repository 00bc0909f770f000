"""The guests of the engine in memory: their consoles, the commands that run in them, the files that lie in them."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from mica.model.errors import Code, MicaError, Problem, invalid, not_found
from mica.model.exec import ExecSpec, ExecState, ExecView, check_exec
from mica.model.operation import Actor
from mica.model.views import VmView
from mica.model.vm import VmState

replace = msgspec.structs.replace
NOW = 1_700_000_000.0


class FakeGuests:
    """``happened`` is notified of everything; ``watchers`` counts who follows a console or a command."""

    def __init__(self) -> None:
        self.happened = asyncio.Condition()
        self.fail: Exception | None = None
        self.machines: dict[str, VmView] = {}
        self.serial: dict[str, bytearray] = {}
        self.typed: dict[str, bytearray] = {}
        self.kept_from = 0
        self.commands: dict[str, ExecView] = {}
        self.output: dict[str, dict[str, bytearray]] = {}
        self.watchers = 0
        self.files: dict[str, bytes] = {}
        self.copied_by: list[str] = []
        self.break_after: int | None = None

    async def vm(self, ref: str) -> VmView:
        if self.fail is not None:
            raise self.fail
        for view in self.machines.values():
            if ref in (view.id, view.name) or (len(ref) >= 8 and view.id.startswith(ref)):
                return view
        raise not_found("VM", ref, hint="`mica vm list` shows them all")

    # -- consoles ----------------------------------------------------------------------------------------------

    async def console_follow(self, vm: str, offset: int | None) -> AsyncIterator[tuple[int, bytes]]:
        """History is kept from ``kept_from`` on; a reader that asks for more gets what there is."""
        history = self.serial.setdefault((await self.vm(vm)).id, bytearray())
        at = max(self.kept_from, len(history) - 65536 if offset is None else offset)
        if at > len(history):
            raise invalid(f"offset {at} is beyond the end, {len(history)}")
        self.watchers += 1
        try:
            while True:
                while at < len(history):
                    piece = bytes(history[at : at + 4096])
                    yield at, piece
                    at += len(piece)
                async with self.happened:
                    while at >= len(history):
                        await self.happened.wait()
        finally:
            self.watchers -= 1

    async def console_write(self, vm: str, data: bytes) -> None:
        """The guest echoes, in capitals."""
        view = await self.vm(vm)
        if view.observed.state is not VmState.RUNNING:
            raise MicaError(Code.STATE_CONFLICT, f"VM {view.name} does not run", hint="start it")
        self.typed.setdefault(view.id, bytearray()).extend(data)
        await self.print(view.id, data.upper())

    async def print(self, vm_id: str, data: bytes) -> None:
        self.serial.setdefault(vm_id, bytearray()).extend(data)
        async with self.happened:
            self.happened.notify_all()

    async def log_of(self, vm: str, which: str) -> bytes:
        view = await self.vm(vm)
        return bytes(self.serial.get(view.id, b"")) if which == "console" else b"qemu says nothing\n"

    async def log(self, vm: str, which: str, tail: int) -> bytes:
        text = await self.log_of(vm, which)
        return text[max(0, len(text) - tail) :]

    # -- commands ----------------------------------------------------------------------------------------------
    # The programs of this guest: `cat` repeats its input, `yes N` writes N bytes, `sleep` ends when it is killed,
    # `deaf` takes no input, `both` writes to stdout and stderr; all others are not found.

    async def exec_start(self, vm: str, spec: ExecSpec, *, by: Actor) -> ExecView:
        view = await self.vm(vm)
        check_exec(spec)
        if view.observed.state is not VmState.RUNNING:
            raise MicaError(Code.AGENT_UNAVAILABLE, f"VM {view.name} does not run", hint="start it")
        record = ExecView(
            id=f"exec-{len(self.commands) + 1}", vm_id=view.id, spec=spec, state=ExecState.RUNNING, started_at=NOW
        )
        self.commands[record.id] = record
        self.output[record.id] = {"stdout": bytearray(), "stderr": bytearray()}
        await self._begin(record)
        return self.commands[record.id]

    async def _begin(self, record: ExecView) -> None:
        program, *args = record.spec.argv
        if program == "yes":
            await self.say(record.id, "stdout", b"y" * int(args[0]))
            await self.end(record.id, 0)
        elif program == "both":
            await self.say(record.id, "stdout", b"out")
            await self.say(record.id, "stderr", b"err")
            await self.end(record.id, 3)
        elif program not in ("cat", "sleep", "deaf"):
            problem = Problem(Code.AGENT_FAILED, f"there is no program {program}")
            self.commands[record.id] = replace(record, state=ExecState.FAILED, error=problem, ended_at=NOW)

    async def say(self, exec_id: str, stream: str, data: bytes) -> None:
        self.output[exec_id][stream].extend(data)
        async with self.happened:
            self.happened.notify_all()

    async def end(self, exec_id: str, exit_code: int, state: ExecState = ExecState.EXITED) -> None:
        done = replace(self.commands[exec_id], state=state, exit_code=exit_code, ended_at=NOW + 1)
        self.commands[exec_id] = done
        async with self.happened:
            self.happened.notify_all()

    async def execs(self, vm: str) -> list[ExecView]:
        id_ = (await self.vm(vm)).id
        return [record for record in self.commands.values() if record.vm_id == id_]

    async def exec_state(self, vm: str, exec_id: str) -> ExecView:
        for record in await self.execs(vm):
            if record.id == exec_id:
                return record
        raise not_found("exec", exec_id, hint=f"`mica vm show {vm}` lists them")

    async def exec_wait(self, vm: str, exec_id: str) -> ExecView:
        await self.exec_state(vm, exec_id)
        async with self.happened:
            while not self.commands[exec_id].state.final:
                await self.happened.wait()
        return self.commands[exec_id]

    async def exec_follow(
        self, vm: str, exec_id: str, stream: Literal["stdout", "stderr"], offset: int
    ) -> AsyncIterator[bytes]:
        await self.exec_state(vm, exec_id)
        data, at = self.output[exec_id][stream], offset
        if at > len(data):
            raise invalid(f"offset {at} of {stream} is beyond the end, {len(data)}")
        self.watchers += 1
        try:
            while True:
                if at < len(data):
                    piece = bytes(data[at : at + 100_000])
                    yield piece
                    at += len(piece)
                    continue
                if self.commands[exec_id].state.final:
                    return
                async with self.happened:
                    while at >= len(data) and not self.commands[exec_id].state.final:
                        await self.happened.wait()
        finally:
            self.watchers -= 1

    async def exec_stdin(self, vm: str, exec_id: str, data: bytes | None) -> None:
        record = await self.exec_state(vm, exec_id)
        if record.state.final or not record.spec.stdin or record.spec.argv[0] == "deaf":
            raise MicaError(Code.STATE_CONFLICT, f"exec {exec_id} takes no input")
        if data is None:
            await self.end(exec_id, 0)
        else:
            await self.say(exec_id, "stdout", data)

    async def exec_kill(self, vm: str, exec_id: str, signal: int) -> None:
        record = await self.exec_state(vm, exec_id)
        if record.state.final:
            raise MicaError(Code.STATE_CONFLICT, f"exec {exec_id} has ended")
        self.commands[exec_id] = replace(record, signal=signal)
        await self.end(exec_id, 128 + signal, ExecState.KILLED)

    # -- files -------------------------------------------------------------------------------------------------

    async def copy_in(
        self, vm: str, dest: str, tar: AsyncIterator[bytes], *, by: Actor, size: int = 0
    ) -> dict[str, object]:
        await self.vm(vm)
        if not dest.startswith("/"):
            raise invalid(f"{dest!r} is no absolute path", hint="begin it with /")
        self.copied_by.append(by.source)
        archive = io.BytesIO()
        async for chunk in tar:
            archive.write(chunk)
        archive.seek(0)
        found = {}
        try:
            with tarfile.open(fileobj=archive) as opened:
                for member in opened:
                    content = opened.extractfile(member)
                    if content is not None:
                        found[f"{dest}/{member.name}"] = content.read()
        except tarfile.TarError as error:
            raise MicaError(Code.CORRUPT, f"what came is no tar archive: {error}") from None
        self.files.update(found)
        return {"files": len(found), "bytes": sum(map(len, found.values()))}

    async def copy_out(self, vm: str, path: str, *, by: Actor) -> AsyncIterator[bytes]:
        """Breaks off with an error after ``break_after`` chunks."""
        await self.vm(vm)
        found = {name: data for name, data in self.files.items() if name == path or name.startswith(f"{path}/")}
        if not found:
            raise not_found("file", path)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as opened:
            for name, data in found.items():
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.size = len(data)
                opened.addfile(entry, io.BytesIO(data))
        self.watchers += 1
        try:
            whole = archive.getvalue()
            for number, start in enumerate(range(0, len(whole), 65536)):
                if number == self.break_after:
                    raise MicaError(Code.AGENT_FAILED, "the agent broke off")
                yield whole[start : start + 65536]
        finally:
            self.watchers -= 1
