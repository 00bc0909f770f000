"""``mica daemon run|stop|status|log``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Duration, Flag, Hidden, Options
from mica.cli.text import age, facts
from mica.client import daemon
from mica.model.errors import TABLE, Code, MicaError, not_found

_FOLLOW_S = 0.25


def run(
    *arguments: str,
    listen: str | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Run the daemon in the foreground: this process becomes it. A service manager starts it like this.

    Parameters
    ----------
    arguments
        After --: further settings of the daemon; see mica daemon run -- --help.
    listen
        Serve the API on this loopback ADDRESS:PORT too, with the token in MICA_HOME/token.
    """
    place = ctx.place()
    argv = daemon.command(place.home, *(() if listen is None else ("--listen", listen)), *arguments)
    ctx.world.stdout.flush()
    ctx.world.stderr.flush()
    os.execve(argv[0], argv, dict(ctx.world.environ))  # noqa: S606 - our own program


async def stop(
    *,
    timeout: Duration = daemon.STOP_TIMEOUT_S,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Stop the daemon; VMs live on, and the next daemon adopts them.

    Parameters
    ----------
    timeout
        How long it may take, for example 1m.
    """
    place = ctx.place()
    pid = await daemon.stop(place, timeout_s=timeout)
    ctx.emit(
        {"pid": pid, "home": str(place.home), "running": False},
        lambda: f"the daemon of {place.home} (pid {pid}) has ended; VMs live on",
    )


async def status(*, options: Options = DEFAULTS, ctx: Annotated[Context, Hidden]) -> int:
    """Say whether the daemon runs, and where. Nothing is started for it."""
    place = ctx.place()
    about: dict[str, Any] = {
        "running": False,
        "home": str(place.home),
        "socket": str(place.socket),
        "log": str(place.log),
    }
    if not await daemon.answers(place):
        ctx.emit(about, lambda: f"no daemon runs for {place.home}")
        return TABLE[Code.DAEMON_UNREACHABLE].exit_status
    pid = await daemon.listener_pid(place)
    about |= {"running": True, "pid": pid}
    async with ctx.client(autostart=False) as client:
        host = await client.host()
    about |= {"version": host.version, "started_at": host.started_at, "vms": host.vms, "vms_running": host.running}
    ctx.emit(
        about,
        lambda: facts(
            (
                ("daemon", "running"),
                ("pid", str(pid)),
                ("version", host.version),
                ("up", age(host.started_at, ctx.now)),
                ("home", str(place.home)),
                ("socket", str(place.socket)),
                ("log", str(place.log) if place.log.exists() else ""),
                ("VMs", f"{host.vms}, {host.running} running"),
                ("note", daemon.logout_note(place)),
            ),
            colour=ctx.colour,
        ),
    )
    return 0


async def log(
    *,
    tail: int = 100,
    follow: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Show the log of a daemon that was started in the background.

    Parameters
    ----------
    tail
        How many lines from its end.
    follow
        Go on with what is added, until Ctrl-C.
    """
    place = ctx.place()
    if not place.log.exists():
        raise not_found(
            "log", str(place.log), hint="a daemon that runs in the foreground or as a service logs to its own output"
        )
    end = place.log.stat().st_size
    lines = daemon.log_tail(place.log, lines=tail)
    if ctx.json and not follow:
        ctx.emit(lines, lambda: "")
        return
    for line in lines:
        ctx.world.stdout.write(line + "\n")
    ctx.world.stdout.flush()
    if follow:
        await _follow(ctx, place.log, end)


async def _follow(ctx: Context, path: Path, offset: int) -> None:
    """Print what is added; a file that was replaced or cut is begun again."""
    inode = path.stat().st_ino
    while True:
        try:
            found = path.stat()
            if found.st_ino != inode or found.st_size < offset:
                inode, offset = found.st_ino, 0
            if found.st_size > offset:
                with path.open("rb") as file:
                    file.seek(offset)
                    data = file.read(1024**2)
                offset += len(data)
                ctx.world.write_bytes(data)
                continue
        except FileNotFoundError:
            inode, offset = -1, 0
        except OSError as error:
            raise MicaError(Code.INTERNAL, f"cannot read {path}: {error.strerror}") from error
        # A file sends no signal to whoever reads it.
        await asyncio.sleep(_FOLLOW_S)
