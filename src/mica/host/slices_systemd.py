"""A part of the control group tree that systemd hands over to us, once per daemon home.

systemd owns the tree and asks everybody else to keep out of it, except below a unit that says ``Delegate=yes``
(systemd.resource-control(5), "Control Group APIs and Delegation"). So a small service of its own is started, which
outlives the daemon and holds the VMs' groups: one job at start, and from then on plain files, as on any cgroup v2.

Its properties are what keeps VMs alive: ``KillMode=process`` and ``SendSIGKILL=no`` (stopping it leaves VMs alone),
``OOMPolicy=continue`` (a VM that runs out of memory does not take the others along).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from mica.host.processes import CLEAN_ENVIRONMENT
from mica.host.slices_files import write
from mica.model.errors import Code, MicaError

_TIMEOUT_S = 10.0
_HOLDER = "mica-holder"
_PROPERTIES = (
    "Delegate=yes",
    "KillMode=process",
    "SendSIGKILL=no",
    "OOMPolicy=continue",
    "TasksMax=infinity",
    "Description=Control groups of Mica's virtual machines",
)


class SystemdUnit:
    """The unit. ``user`` asks the user's own manager; ``mount`` is where cgroup v2 is mounted."""

    def __init__(self, name: str, *, user: bool, environment: dict[str, str], mount: Path) -> None:
        self.name = name
        self._scope = ["--user"] if user else []
        # Where pam_systemd puts a user's manager (XDG Base Directory Specification, user-runtime-dir@.service).
        runtime = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}"} if user else {}
        self._environment = {**CLEAN_ENVIRONMENT, **runtime, **environment}
        self._mount = mount
        self._directory: Path | None = None

    async def start(self) -> Path:
        """Start the unit unless it runs, and return its group's directory, empty of processes itself.

        Raises ``host-lacks`` when there is no manager to talk to, or it refuses.
        """
        directory = await self._find()
        if directory is None:
            properties = [word for text in _PROPERTIES for word in ("--property", text)]
            await self._call(
                "systemd-run",
                *self._scope,
                "--quiet",
                "--collect",
                "--unit",
                self.name,
                *properties,
                "sleep",
                "infinity",
            )
            directory = await self._find()
        if directory is None:
            raise MicaError(Code.HOST_LACKS, f"systemd started {self.name} but tells no control group for it")
        if not os.access(directory / "cgroup.procs", os.W_OK):
            raise MicaError(Code.HOST_LACKS, f"systemd did not delegate {directory} to us")
        # A group that gives controllers on may hold no process itself, so its own process moves one down.
        holder = directory / _HOLDER
        holder.mkdir(exist_ok=True)
        for pid in (directory / "cgroup.procs").read_text(encoding="ascii").split():
            write(holder / "cgroup.procs", pid)
        self._directory = directory
        return directory

    async def _find(self) -> Path | None:
        text = await self._call("systemctl", *self._scope, "show", "--property=ActiveState,ControlGroup", self.name)
        seen = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if seen.get("ActiveState") != "active" or not seen.get("ControlGroup"):
            return None
        directory = self._mount / seen["ControlGroup"].lstrip("/")
        return directory if directory.is_dir() else None

    async def attach(self, group: Path, pid: int) -> None:
        """Have systemd move a process into a group below the unit.

        A daemon in a login session may not do so itself: the session's group and the unit's meet in one that root
        owns, and moving needs the right to write there. The user's manager passes it on to the system's.
        """
        assert self._directory is not None
        manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
        below = "/" + str(group.relative_to(self._directory))
        arguments = ("AttachProcessesToUnit", "ssau", self.name, below, "1", str(pid))
        await self._call("busctl", *self._scope, "--quiet", "call", *manager, *arguments)

    async def _call(self, program: str, *arguments: str) -> str:
        path = shutil.which(program, path=self._environment["PATH"])
        if path is None:
            raise MicaError(
                Code.HOST_LACKS, f"systemd runs here, but {program} is missing", hint="sudo apt-get install systemd"
            )
        process = await asyncio.create_subprocess_exec(
            path,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                output, errors = await process.communicate()
        except TimeoutError as error:
            raise MicaError(Code.HOST_LACKS, f"{program} did not answer within {_TIMEOUT_S:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            words = errors.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
            raise MicaError(Code.HOST_LACKS, f"{program}: {words[-1]}")
        return output.decode(errors="replace")
