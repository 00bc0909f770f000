"""Virtual machines: one method per verb, and :class:`VmHandle`, one VM in the hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from mica.client.events import Events
from mica.client.operations import OnProgress, Operations
from mica.client.transport import Params, Transport, path_of
from mica.model.errors import Code, MicaError
from mica.model.operation import Operation
from mica.model.units import parse_size
from mica.model.views import VmCreate, VmDelete, VmPage, VmRestore, VmSet, VmStart, VmStop, VmView
from mica.model.vm import AgentState, Publish, VmState

if TYPE_CHECKING:
    from mica.client.handle import VmHandle

AGENT_TIMEOUT_S = 300.0
_PAGE = 500

# From these no guest will answer without somebody's word.
_ENDED = frozenset(
    {VmState.STOPPED, VmState.SUSPENDED, VmState.CRASHED, VmState.TRASHED, VmState.DELETING, VmState.GONE}
)


def parse_publish(text: str | Publish) -> Publish:
    """``8080:80``, ``127.0.0.1:8080:80``, ``53:53/udp`` or ``80`` (the host chooses its port). Raises ``invalid``."""
    if isinstance(text, Publish):
        return text
    rest, _, protocol = text.partition("/")
    address, _, ports = rest.rpartition("]:") if rest.startswith("[") else ("", "", rest)
    parts = ports.split(":")
    try:
        if not 1 <= len(parts) <= (2 if address else 3):
            raise ValueError(text)
        host = address.lstrip("[") or (parts[0] if len(parts) == 3 else "127.0.0.1")
        guest_port, host_port = int(parts[-1]), int(parts[-2]) if len(parts) > 1 else 0
    except ValueError:
        raise MicaError(
            Code.INVALID,
            f"{text!r} does not say what to publish",
            hint="write HOST_PORT:GUEST_PORT, for example 8080:80 or 127.0.0.1:5353:53/udp",
        ) from None
    return Publish(guest_port, host_port, host, protocol or "tcp")


def make_create(
    image: str,
    *,
    name: str = "",
    cpus: int | None = None,
    memory: str | int | None = None,
    disk: str | int | None = None,
    publish: Iterable[str | Publish] = (),
    labels: dict[str, str] | None = None,
    start: bool = False,
    overcommit: bool = False,
    **more: Any,
) -> VmCreate:
    """A :class:`VmCreate` from what people write: sizes as ``"1G"``, published ports as ``"8080:80"``.

    ``more`` are further fields of :class:`VmCreate`. Raises ``invalid``.
    """
    return VmCreate(
        image=image,
        name=name,
        cpus=cpus,
        memory=None if memory is None else parse_size(memory),
        disk=None if disk is None else parse_size(disk),
        publish=tuple(parse_publish(item) for item in publish),
        labels=labels or {},
        start=start,
        overcommit=overcommit,
        **more,
    )


class Vms:
    """``client.vms``. A VM is named by its name, its id, or the beginning of its id (8 characters at least).

    A verb waits for its operation and returns it; with ``wait=False`` it returns as soon as it is accepted.
    """

    def __init__(self, transport: Transport, operations: Operations, events: Events) -> None:
        self.transport = transport
        self.operations = operations
        self.events = events

    async def list(self, *, labels: dict[str, str] | None = None, trashed: bool = False) -> list[VmHandle]:
        """All VMs, or those in the trash; with ``labels`` only those that have all of them."""
        from mica.client.handle import VmHandle

        out: list[VmHandle] = []
        label = [f"{key}={value}" for key, value in (labels or {}).items()]
        after = ""
        while True:
            params: Params = {"after": after, "limit": str(_PAGE), "trashed": trashed, "label": label}
            page = await self.transport.request("GET", path_of("vms"), VmPage, params=params)
            out += [VmHandle(self, view) for view in page.items]
            after = page.next
            if not after:
                return out

    async def get(self, ref: str) -> VmHandle:
        """Raises ``not-found``, and ``invalid`` where the beginning of an id fits several."""
        from mica.client.handle import VmHandle

        return VmHandle(self, await self.view(ref))

    async def view(self, ref: str) -> VmView:
        return await self.transport.request("GET", path_of("vms", ref), VmView)

    async def create(self, body: VmCreate, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Create a VM; the operation's ``target`` is ``vm/<id>``. Raises what the operation failed with."""
        return await self._verb("POST", path_of("vms"), body, None, wait, on_progress)

    async def start(
        self,
        ref: str,
        *,
        paused: bool = False,
        overcommit: bool = False,
        last_valid: bool = False,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Operation:
        """Raises ``insufficient-memory`` with the numbers and the ways out; ``overcommit`` insists.

        Raises ``corrupt``, ``not-found`` where a disk is damaged or missing. With ``last_valid`` the VM goes back to
        its last valid snapshot then, what is damaged is kept, and the operation's ``result`` names both.
        """
        body = VmStart(paused=paused, overcommit=overcommit, last_valid=last_valid)
        return await self._act(ref, "start", body, wait, on_progress)

    async def stop(
        self,
        ref: str,
        *,
        force: bool = False,
        timeout_s: float | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Operation:
        """Ask the guest to shut down, and force it after ``timeout_s`` seconds (the VM's own setting if ``None``)."""
        return await self._act(ref, "stop", VmStop(force, timeout_s), wait, on_progress)

    async def restart(
        self,
        ref: str,
        *,
        force: bool = False,
        timeout_s: float | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Operation:
        return await self._act(ref, "restart", VmStop(force, timeout_s), wait, on_progress)

    async def pause(self, ref: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        return await self._act(ref, "pause", None, wait, on_progress)

    async def suspend(self, ref: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Its memory goes to disk and its process ends; :meth:`start` and :meth:`resume` go on where it was.

        Raises ``insufficient-disk``; then it runs on.
        """
        return await self._act(ref, "suspend", None, wait, on_progress)

    async def discard(self, ref: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Give up what a suspended VM had in memory: it is stopped then, as after a power cut."""
        return await self._act(ref, "discard", None, wait, on_progress)

    async def resume(self, ref: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Let it run on, paused or suspended."""
        return await self._act(ref, "resume", None, wait, on_progress)

    async def restore(
        self, ref: str, *, name: str = "", wait: bool = True, on_progress: OnProgress | None = None
    ) -> Operation:
        """Bring it back from the trash, under another ``name`` if its own has been taken."""
        return await self._act(ref, "restore", VmRestore(name), wait, on_progress)

    async def set(
        self,
        ref: str,
        body: VmSet,
        *,
        if_match: int | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Operation:
        """Change fields; ``if_match`` is the generation that is being changed. Raises ``generation-conflict``."""
        return await self._verb("PATCH", path_of("vms", ref), body, if_match, wait, on_progress)

    async def delete(
        self,
        ref: str,
        *,
        purge: bool = False,
        force: bool = False,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Operation:
        """Into the trash, or at once with ``purge``; ``force`` stops it first. Raises ``protected``."""
        body = VmDelete(purge, force)
        params: Params = {"purge": body.purge, "force": body.force}
        operation = await self.transport.request("DELETE", path_of("vms", ref), Operation, params=params)
        return await self.operations.wait(operation.id, on_progress) if wait else operation

    async def log(self, ref: str, which: str = "console", *, tail: int = 64 * 1024) -> bytes:
        """The last ``tail`` bytes of the serial console's history, or of QEMU's own messages (``qemu``)."""
        params: Params = {"which": which, "tail": tail}
        return await self.transport.raw(path_of("vms", ref, "log"), params=params)

    async def wait_until(self, ref: str, done: Callable[[VmView], bool], *, timeout_s: float, what: str) -> VmView:
        """Wait for a condition on a VM by its events; ``what`` names it in the error.

        ``done`` may raise. Raises ``timeout``, and ``not-found`` when the VM goes away.
        """
        view: VmView | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    revision = await self.events.revision()
                    view = await self.view(ref)
                    if done(view):
                        return view
                    try:
                        async with aclosing(self.events(revision)) as events:
                            async for event in events:
                                if event.kind == "vm" and event.id == view.id:
                                    view = await self.view(view.id)
                                    if done(view):
                                        return view
                    except MicaError as error:
                        if error.code is not Code.GONE:  # events were missed: look anew
                            raise
        except TimeoutError:
            name = view.name if view else ref
            raise MicaError(
                Code.TIMEOUT,
                f"{name}: {what} did not come true within {timeout_s:g} s",
                hint=f"look: mica vm show {name}",
            ) from None

    async def wait_agent(self, ref: str, *, timeout_s: float = AGENT_TIMEOUT_S) -> VmView:
        """Wait until the guest agent has opened its port.

        Raises ``agent-unavailable`` (the VM has no agent port, or it was not opened within ``timeout_s`` seconds) and
        what ended the VM when it ends before.
        """
        try:
            return await self.wait_until(ref, _agent_ready, timeout_s=timeout_s, what="an answer of the guest agent")
        except MicaError as error:
            if error.code is not Code.TIMEOUT:
                raise
            raise MicaError(
                Code.AGENT_UNAVAILABLE,
                f"the guest agent of {ref} has not answered within {timeout_s:g} s",
                hint=f"watch the guest: mica vm console {ref}",
                retryable=True,
            ) from error

    async def _act(
        self, ref: str, verb: str, body: msgspec.Struct | None, wait: bool, on_progress: OnProgress | None
    ) -> Operation:
        return await self._verb("POST", path_of("vms", ref, verb), body, None, wait, on_progress)

    async def _verb(
        self,
        method: str,
        path: str,
        body: msgspec.Struct | None,
        if_match: int | None,
        wait: bool,
        on_progress: OnProgress | None,
    ) -> Operation:
        operation = await self.transport.request(method, path, Operation, body=body, if_match=if_match)
        return await self.operations.wait(operation.id, on_progress) if wait else operation


def _agent_ready(view: VmView) -> bool:
    observed = view.observed
    if observed.agent is AgentState.READY and observed.state in (VmState.RUNNING, VmState.PAUSED):
        return True
    if observed.state in _ENDED:
        if observed.problem is not None:
            raise MicaError.of(observed.problem)
        raise MicaError(
            Code.STATE_CONFLICT,
            f"{view.name} is {observed.state}" + (f" ({observed.reason})" if observed.reason else ""),
            hint=f"see why: mica vm log {view.name}",
        )
    if not view.spec.agent:
        raise MicaError(
            Code.AGENT_UNAVAILABLE,
            f"{view.name} has no guest agent",
            hint=f"use its serial console: mica vm console {view.name}",
        )
    return False


def vm_id(operation: Operation) -> str:
    """The id of the VM that an operation is about."""
    return operation.target.partition("/")[2] or operation.target
