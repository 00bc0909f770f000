"""The composition root: the only place that gives objects to each other, and the daemon's entry point."""

from __future__ import annotations

import argparse
import asyncio
import functools
import grp
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from mica.api.app import create_app
from mica.api.auth import Access
from mica.api.lifetime import Lifetime
from mica.api.server import ApiServer
from mica.daemon import logging
from mica.daemon.builder import Builder
from mica.daemon.home import owned
from mica.daemon.service import Service
from mica.daemon.settings import SETTINGS, Settings, load
from mica.engine.definition import Ports
from mica.engine.engine import Engine
from mica.engine.execs import ExecRows
from mica.engine.records import Records
from mica.guest.copy import Copies
from mica.guest.guests import AgentGuests
from mica.guest.identity import AgentIdentities
from mica.guest.sessions import ExecSessions
from mica.host import slices
from mica.model.errors import Code, MicaError
from mica.qemu.console import Consoles
from mica.qemu.logs import LogKeeper
from mica.store.sqlite import SqliteStore


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[ApiServer]:
    """A whole daemon, from the lock on its home to its sockets. Leaving it leaves the VMs alone."""
    logger = logging.configure(settings.log_level)
    builder = Builder(settings)
    async with AsyncExitStack() as stack:
        stack.enter_context(owned(settings))
        store = await stack.enter_async_context(await SqliteStore.open(settings.home / "state.db"))
        share = await slices.detect(
            root=builder.root, prefix=f"mica-{settings.runtime_dir.name}", environment=settings.session
        )
        stack.callback(share.retire)
        hypervisor = builder.hypervisor(share)
        stack.push_async_callback(hypervisor.close)
        await builder.clear_proofs()
        await hypervisor.look()
        consoles, guests, host = Consoles(settings.log_dir), AgentGuests(), builder.host()
        stack.push_async_callback(consoles.close)
        stack.push_async_callback(guests.close)
        identities = await stack.enter_async_context(AgentIdentities(guests).running())
        lifetime = Lifetime()
        ports = Ports(
            records=Records(store),
            clock=builder.clock,
            host=host,
            hypervisor=hypervisor,
            volumes=builder.volumes(),
            networks=builder.networks(),
            slices=share,
            images=builder.images(),
            guests=guests,
            identities=identities,
            parts=builder.parts(),
            branches=builder.branches(),
            ram=hypervisor.ram,
            policy=builder.policy(host.capacity().memory),
        )
        engine = await stack.enter_async_context(Engine(ports, on_ended=lifetime.metrics.operation).running())
        execs = await stack.enter_async_context(
            ExecSessions(guests, ExecRows(ports.records), settings.home / "execs", builder.clock).running(
                await engine.views.running()
            )
        )
        service = Service(
            engine=engine,
            hypervisor=hypervisor,
            consoles=consoles,
            execs=execs,
            copies=Copies(execs, guests),
            settings=settings,
            doctor=functools.partial(builder.doctor, share),
            started_at=builder.clock.now(),
        )
        await stack.enter_async_context(LogKeeper(settings.log_dir, hypervisor.let_log_grow).running())
        yield await stack.enter_async_context(_server(settings, service, lifetime, logger))


def _server(settings: Settings, service: Service, lifetime: Lifetime, logger: logging.Logger) -> ApiServer:
    access = Access(uid=settings.uid, token=_token(settings) if settings.listen else "")
    app = create_app(service, access=access, log=logger, lifetime=lifetime)
    gid = _group() if settings.uid == 0 else None
    return ApiServer(
        app,
        lifetime,
        unix=settings.api_socket,
        unix_mode=0o600 if gid is None else 0o660,
        unix_gid=gid,
        tcp=settings.listen,
    )


def _group() -> int | None:
    """The group ``mica``, whose members are administrators."""
    try:
        return grp.getgrnam("mica").gr_gid
    except KeyError:
        return None


def _token(settings: Settings) -> str:
    """The token of the TCP side, made at first use; a file that only its owner can read."""
    file = settings.token_file
    try:
        status = file.lstat()
    except FileNotFoundError:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
        return _token(settings)
    if status.st_mode & 0o077 or status.st_uid != settings.uid:
        raise MicaError(
            Code.FORBIDDEN, f"{file} is open to others", hint=f"chmod 600 {file}, or remove it for a new one"
        )
    return file.read_text(encoding="ascii").strip()


async def serve(settings: Settings) -> None:
    """Run a daemon until SIGTERM or SIGINT."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings) as server:
        print(f"mica serves {settings.home} on {settings.api_socket}", file=sys.stderr, flush=True)
        if server.port is not None:
            assert settings.listen is not None
            print(
                f"and on http://{settings.listen[0]}:{server.port} with the token in {settings.token_file}",
                file=sys.stderr,
                flush=True,
            )
        await stop.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m mica.daemon``."""
    parser = argparse.ArgumentParser(
        prog="mica daemon", description="Run the daemon of one MICA_HOME in the foreground."
    )
    parser.add_argument("--home", help="all state of the daemon; MICA_HOME if not given")
    for name, text in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text)
    options = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    # VMs' users must be able to pass through directories that say so; each mode is given where something is made.
    os.umask(0o022)
    try:
        settings = load(options)
        # A daemon that was started by a command must not hold that command's directory.
        os.chdir("/")
        asyncio.run(serve(settings))
    except MicaError as error:
        print(f"mica daemon: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.info.exit_status
    return 0
