"""Files in and out of a guest, from and to this host."""

from __future__ import annotations

import posixpath
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from mica.client.tarring import measure, pack, unpack
from mica.client.transport import Transport, path_of
from mica.model.errors import Code, MicaError, invalid, not_found
from mica.model.units import Bytes

# No byte of a copy has come for so long: the guest, or whatever it waits for, hangs.
IDLE_S = 300.0

OnCopied = Callable[[int, int | None], None]
"""Called with the bytes so far, and the bytes in all where that is known."""


class CopyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied: ``path`` is where it is now, ``size`` the bytes of its files."""

    path: str
    files: int
    size: Bytes


async def copy_in(
    transport: Transport,
    vm: str,
    source: Path,
    dest: str,
    *,
    is_directory: Callable[[str], Awaitable[bool]],
    on_progress: OnCopied | None = None,
) -> CopyReport:
    """Copy a file or directory to ``dest`` in the guest: into it where it is a directory there, else by that name.

    Raises ``not-found``, ``invalid``, and what the guest refuses it with; then nothing of it is in the guest.
    """
    _check_guest_path(dest)
    source = source.absolute()
    if not source.exists() and not source.is_symlink():
        raise not_found("file", str(source))
    if dest.endswith("/") or await is_directory(dest):
        directory, name = dest.rstrip("/") or "/", source.name
    else:
        directory, name = posixpath.split(dest)
    if not name:
        raise invalid(f"{source} has no name to copy it by", hint="name the file or directory itself")
    total = measure(source)
    async with transport.stream(
        "PUT",
        path_of("vms", vm, "files"),
        params={"path": directory},
        content=pack(source, name, count=_counter(on_progress, total)),
        headers={"Content-Type": "application/x-tar"},
        idle_s=IDLE_S,
    ) as response:
        await response.aread()
    return _report(posixpath.join(directory, name), source)


async def copy_out(
    transport: Transport, vm: str, path: str, dest: Path, *, on_progress: OnCopied | None = None
) -> CopyReport:
    """Copy ``path`` of the guest to ``dest`` here: into it where it is a directory, else by that name.

    Raises ``not-found``, ``exists``, ``corrupt``, ``insufficient-disk``; then nothing of it is here.
    """
    _check_guest_path(path)
    try:
        async with transport.stream(
            "GET", path_of("vms", vm, "files"), params={"path": path}, idle_s=IDLE_S
        ) as response:
            landed = await unpack(response.aiter_raw(), dest, count=_counter(on_progress, None))
    except MicaError as error:
        if error.code is not Code.DAEMON_UNREACHABLE or "lost" not in error.message:
            raise
        raise MicaError(
            Code.AGENT_FAILED,
            f"the copy of {path} broke off; nothing of it was kept",
            hint="try again; mica daemon log says why",
            retryable=True,
        ) from error
    return _report(str(landed), landed)


def _check_guest_path(path: str) -> None:
    if not path.startswith("/"):
        raise invalid(f"{path!r} is no absolute path in a guest", hint="begin it with /")


def _counter(on_progress: OnCopied | None, total: int | None) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    return lambda done: on_progress(done, total)


def _report(path: str, root: Path) -> CopyReport:
    files = [root] if root.is_file() or root.is_symlink() else [item for item in root.rglob("*") if item.is_file()]
    return CopyReport(path=path, files=len(files), size=Bytes(sum(file.lstat().st_size for file in files)))
