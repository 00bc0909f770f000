"""The client: one connection to one daemon, with one attribute per noun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mica.client import daemon
from mica.client.events import Events
from mica.client.images import Images, Waiter
from mica.client.operations import OnProgress, Operations
from mica.client.schedules import Schedules
from mica.client.snapshots import Snapshots
from mica.client.templates import Templates
from mica.client.transport import DEFAULT_TIMEOUT_S, Endpoint, Transport, is_denied, parse_url, path_of
from mica.client.vms import AGENT_TIMEOUT_S, Vms, make_create, vm_id
from mica.model.doctor import DoctorReport
from mica.model.errors import Code, MicaError
from mica.model.paths import state_home
from mica.model.views import HostView
from mica.model.vm import AgentState, Publish

if TYPE_CHECKING:
    from mica.client.handle import VmHandle

_DOCTOR_TIMEOUT_S = 180.0


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"mica: {text}\n")


class Client:
    """A connection to a Mica daemon.

        async with Client() as c:
            vm = await c.run("micro")
            print(await vm.exec("uname", "-r"))

    Without arguments it uses the daemon of this user's ``MICA_HOME`` on this host, and starts one if none runs
    (``autostart``). ``url`` is ``http://127.0.0.1:PORT`` with a ``token``, or ``unix:///path/to/api.sock``; ``home``
    names another ``MICA_HOME``. ``timeout_s`` bounds every single request; waiting for operations has bounds of its
    own. ``announce`` is told in words when a daemon is started; by default that goes to the standard error stream.
    ``environ`` is the environment to read ``MICA_HOME``, ``MICA_URL``, ``MICA_TOKEN`` and the XDG variables from.

    Every method raises :class:`mica.MicaError` and nothing else that is not a bug or a cancellation.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        home: str | Path | None = None,
        autostart: bool = True,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        announce: Callable[[str], None] = _to_stderr,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._announce = announce
        self._started: int | None = None
        if url is None and home is None:
            url = self._environ.get("MICA_URL") or None
        self.place: daemon.Place | None = None
        if url:
            endpoint = parse_url(url, token or self._environ.get("MICA_TOKEN", ""))
        else:
            uid = os.geteuid()
            where = Path(home).absolute() if home is not None else state_home(self._environ, uid)
            self.place = daemon.locate(where, self._environ, uid)
            daemon.check_runtime_dir(self.place.socket.parent, self.place.owner)
            endpoint = Endpoint(socket=str(self.place.socket))
        starter = self._start_daemon if autostart and self.place is not None and self.place.ours else None
        self.transport = Transport(endpoint, timeout_s=timeout_s, starter=starter, unreachable=self._unreachable)
        self.operations = Operations(self.transport)
        self.events = Events(self.transport)
        self.images = Images(self.transport, self.operations)
        self.snapshots = Snapshots(self.transport, self.operations)
        self.schedules = Schedules(self.transport, self.operations)
        self.templates = Templates(self.transport, self.operations)
        self.vms = Vms(self.transport, self.operations, self.events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. VMs, operations and a daemon that was started go on."""
        await self.transport.aclose()
        if self._started is not None:
            daemon.reap(self._started)

    async def _start_daemon(self) -> None:
        assert self.place is not None
        self._started = await daemon.ensure(self.place, self._environ, announce=self._announce) or self._started

    def _unreachable(self, error: BaseException) -> MicaError:
        if self.place is not None:
            return daemon.denied(self.place, error) if is_denied(error) else daemon.unreachable(self.place)
        return MicaError(
            Code.FORBIDDEN if is_denied(error) else Code.DAEMON_UNREACHABLE,
            f"no daemon answers at {self.transport.endpoint.text} ({error})",
            hint="is it running there, and is the address right? For the one on this host leave out --url and MICA_URL",
            retryable=True,
        )

    async def host(self) -> HostView:
        """This host and its daemon."""
        return await self.transport.request("GET", path_of("host"), HostView)

    async def doctor(self, *, fresh: bool = False) -> DoctorReport:
        """What the host can do, with proofs. ``fresh`` proves the accelerators again: seconds to a minute."""
        return await self.transport.request(
            "GET", path_of("host", "doctor"), DoctorReport, params={"fresh": fresh}, timeout_s=_DOCTOR_TIMEOUT_S
        )

    async def ensure(self, ref: str, *, waiter: Waiter | None = None) -> bool:
        """Make sure that a VM can be made from ``ref``, an image or a template; returns whether it has a guest agent.

        An image that Mica knows how to make is built first. Raises ``not-found`` naming what there is.
        """
        try:
            return (await self.images.ensure(ref, waiter=waiter)).image.agent
        except MicaError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            try:
                spec = (await self.templates.get(ref)).snapshot.spec
            except MicaError as unknown:
                if unknown.code is not Code.NOT_FOUND:
                    raise
                raise error from None
        return spec.image is not None and (await self.images.get(spec.image)).image.agent

    async def run(
        self,
        image: str,
        *,
        name: str | None = None,
        cpus: int | None = None,
        memory: str | int | None = None,
        disk: str | int | None = None,
        publish: Iterable[str | Publish] = (),
        labels: Mapping[str, str] | None = None,
        rm: bool = False,
        overcommit: bool = False,
        wait_agent: bool = True,
        agent_timeout_s: float = AGENT_TIMEOUT_S,
        on_progress: OnProgress | None = None,
        waiter: Waiter | None = None,
        **more: Any,
    ) -> VmHandle:
        """Create a VM from ``image``, start it, wait until its guest agent answers, and return it.

        ``image`` may also be the name of a template: the VM begins as a copy of that, memory and all. ``micro`` and
        ``debian`` are built on first use. Sizes are bytes or words such as ``"512M"``; ``publish`` takes
        ``"8080:80"``. With ``rm`` the VM is deleted for good when its guest shuts down, and at the end of ``async with
        vm:``. ``more`` are further fields of :class:`mica.model.views.VmCreate`. ``on_progress`` is called with the
        operation that is waited for; ``waiter`` replaces how operations are waited for.

        Raises ``not-found`` naming the images there are, ``insufficient-memory`` with the ways out, ``exists``,
        ``agent-unavailable`` and what QEMU said.
        """
        wait = waiter or (lambda operation: self.operations.wait(operation.id, on_progress))
        agent = await self.ensure(image, waiter=wait)
        body = make_create(
            image,
            name=name or "",
            cpus=cpus,
            memory=memory,
            disk=disk,
            publish=publish,
            labels=dict(labels or {}),
            ephemeral=rm,
            start=True,
            overcommit=overcommit,
            **more,
        )
        operation = await wait(await self.vms.create(body, wait=False))
        vm = await self.vms.get(vm_id(operation))
        vm.rm = rm
        if wait_agent and agent and vm.view.observed.agent is not AgentState.READY:
            await vm.wait_agent(timeout_s=agent_timeout_s)
        return vm
