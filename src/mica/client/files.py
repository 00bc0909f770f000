"""Files in and out of a guest, from and to this host."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from mica.client.archives import CopyReport, OnBytes, measure, pack, unpack
from mica.client.transport import Transport, path_of
from mica.model.errors import Code, MicaError, invalid

__all__ = ["CopyReport", "OnBytes", "copy_in", "copy_out"]

# No byte of a copy has come for so long: the guest, or whatever it waits for, hangs.
IDLE_S = 300.0


async def copy_in(
    transport: Transport,
    vm: str,
    source: Path,
    dest: str,
    *,
    is_directory: Callable[[str], Awaitable[bool]],
    on_progress: OnBytes | None = None,
) -> CopyReport:
    """Copy a file or directory to ``dest`` in the guest: into it where it is a directory there, else by that name.

    Raises ``not-found``, ``invalid``, and what the guest refuses it with; then nothing of it is in the guest.
    """
    _check_guest_path(dest)
    source = source.absolute()
    report = measure(source)
    if dest.endswith("/") or await is_directory(dest):
        directory, name = dest.rstrip("/") or "/", source.name
    else:
        directory, name = posixpath.split(dest)
    if not name:
        raise invalid(f"{source} has no name to copy it by", hint="name the file or directory itself")
    async with transport.stream(
        "PUT",
        path_of("vms", vm, "files"),
        params={"path": directory, "size": report.bytes},
        content=pack(source, name, on_progress),
        headers={"Content-Type": "application/x-tar"},
        idle_s=IDLE_S,
    ) as response:
        summary = json.loads(await response.aread())
    return msgspec.structs.replace(report, verified=bool(summary.get("checked_by", True)))


async def copy_out(
    transport: Transport, vm: str, path: str, dest: Path, *, on_progress: OnBytes | None = None
) -> CopyReport:
    """Copy ``path`` of the guest to ``dest`` here: into it where it is a directory, else by that name.

    Raises ``not-found``, ``invalid``, ``corrupt``, ``agent-failed`` when it broke off; then nothing of it is here.
    """
    _check_guest_path(path)
    where = path_of("vms", vm, "files")
    arrived = False
    try:
        async with transport.stream("GET", where, params={"path": path}, idle_s=IDLE_S) as response:
            arrived = True
            return await unpack(response.aiter_raw(), dest, on_progress)
    except MicaError as error:
        if not arrived or error.code is not Code.DAEMON_UNREACHABLE:
            raise
        raise MicaError(
            Code.AGENT_FAILED,
            f"the copy of {path} broke off; nothing of it was kept",
            hint="mica daemon log says why",
            retryable=True,
        ) from error


def _check_guest_path(path: str) -> None:
    if not path.startswith("/"):
        raise invalid(f"{path!r} is no absolute path in a guest", hint="begin it with /")
