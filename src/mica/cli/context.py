"""What a running command works with: its options, its streams, a client, and how results, notices and waits look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mica.cli.interrupts import Interrupts, absorb_cancellation
from mica.cli.options import Options
from mica.cli.text import clean, paint
from mica.cli.world import World
from mica.model.errors import MicaError, invalid
from mica.model.operation import Operation

if TYPE_CHECKING:
    from mica.client import Client
    from mica.client.daemon import Place

WAIT_TIMEOUT_S = 3600.0
_CANCEL_TIMEOUT_S = 600.0


class Context:
    """Made once per command and given to it as ``ctx``. ``width`` is the terminal's, ``None`` where there is none."""

    def __init__(self, world: World, options: Options, interrupts: Interrupts) -> None:
        self.world = world
        self.options = options
        self.interrupts = interrupts
        self.json = options.json
        self.colour = not options.json and world.colour(world.stdout)
        self.width = world.columns(world.stdout) if world.is_terminal(world.stdout) else None
        self.now = time.time()

    def client(self, *, autostart: bool = True) -> Client:
        """A client as the options say; close it with ``async with``."""
        from mica.client import Client

        options = self.options
        home = options.home
        url = options.url or (None if home else self.world.environ.get("MICA_URL") or None)
        return Client(
            url=url,
            token=self._token() if url else None,
            home=None if url else home,
            autostart=autostart,
            announce=self.say,
            environ={key: value for key, value in self.world.environ.items() if key != "MICA_URL"},
        )

    def _token(self) -> str | None:
        path = self.options.token_file or self.world.environ.get("MICA_TOKEN_FILE")
        if not path:
            return self.world.environ.get("MICA_TOKEN")
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise invalid(
                f"cannot read the token from {path}: {error}", hint="give --token-file a file of yours"
            ) from error

    def place(self) -> Place:
        """Where this host's daemon is, for commands that are about its process. Raises ``invalid`` with ``--url``."""
        from mica.client.daemon import locate
        from mica.model.paths import state_home

        if self.options.url:
            raise invalid("this is about the daemon's process on this host", hint="leave --url out, or give --home")
        home = self.options.home
        where = Path(home).absolute() if home else state_home(self.world.environ, self.world.uid)
        return locate(where, self.world.environ, self.world.uid)

    def say(self, text: str) -> None:
        """A notice on standard error; none with ``--json``, where that stream carries problems only."""
        if not self.json:
            self.world.stderr.write(f"mica: {text}\n")
            self.world.stderr.flush()

    def emit(self, value: Any, text: Callable[[], str]) -> None:
        """The result: ``value`` as JSON, or ``text()``, which may be empty."""
        out = encode_json(value) if self.json else text()
        if out:
            self.world.stdout.write(out + "\n")
            self.world.stdout.flush()

    async def perform(self, client: Client, submit: Awaitable[Operation], *, cancel: bool = False) -> Operation:
        """Submit an operation and wait for it with progress.

        Ctrl-C while it runs: with ``cancel`` the daemon is asked to cancel it and that is waited for, a second one
        leaves at once; without, the first leaves. What goes on is said. Raises what the operation failed with.
        """
        accepted = asyncio.ensure_future(submit)
        try:
            operation = await asyncio.shield(accepted)
        except asyncio.CancelledError:
            # The daemon may have accepted it already: without its id it could not be cancelled.
            absorb_cancellation()
            operation = await accepted
            await self._interrupted(client, operation, cancel=cancel)
            raise
        return await self.wait(client, operation, cancel=cancel)

    async def wait(
        self, client: Client, operation: Operation, *, cancel: bool = False, timeout_s: float = WAIT_TIMEOUT_S
    ) -> Operation:
        """The second half of :meth:`perform`."""
        from mica.cli.progress import Progress

        with Progress(self.world, quiet=self.json) as progress:
            try:
                return await client.operations.wait(operation.id, progress, timeout_s=timeout_s)
            except asyncio.CancelledError:
                progress.close()
                absorb_cancellation()
                await self._interrupted(client, operation, cancel=cancel)
                raise

    async def _interrupted(self, client: Client, operation: Operation, *, cancel: bool) -> None:
        verb = f"{operation.verb} {operation.target_name}".strip()
        going_on = f"{verb} goes on; look at it with: mica operation show {operation.id}"
        if not cancel or self.interrupts.hurried:
            self.say(going_on)
            return
        self.say(f"cancelling {verb}; Ctrl-C again leaves at once")
        try:
            await client.operations.cancel(operation.id)
            ended = await client.operations.settle(operation.id, timeout_s=_CANCEL_TIMEOUT_S)
        except asyncio.CancelledError:
            self.say(going_on)
            raise
        except MicaError as error:
            self.say(f"{error}; {going_on}")
            return
        self.say(f"{verb}: {ended.state}")

    def title(self, text: str) -> str:
        return paint(clean(text), "1", self.colour)


def encode_json(value: Any) -> str:
    """Indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()


async def for_each(
    ctx: Context,
    refs: Sequence[str],
    work: Callable[[str], Awaitable[Operation]],
    outcome: Callable[[Operation], Awaitable[str]],
) -> int:
    """Do it to all at once; tell the outcomes, report each failure; the exit status is the first failure's."""
    from mica.cli.main import report

    if len(set(refs)) != len(refs):
        raise invalid("something is named twice", hint="name each once")
    results = await asyncio.gather(*(work(ref) for ref in refs), return_exceptions=True)
    done: list[Operation] = []
    failed: list[MicaError] = []
    for result in results:
        if isinstance(result, MicaError):
            failed.append(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            done.append(result)
    lines = [] if ctx.json else [await outcome(operation) for operation in done]
    ctx.emit(done, lambda: "\n".join(lines))
    for error in failed:
        report(ctx.world, error, ctx.json)
    return failed[0].info.exit_status if failed else 0
