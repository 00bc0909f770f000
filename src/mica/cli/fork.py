"""``mica fork``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, NamedTuple

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Flag, Hidden, Options, SnapshotArg, VmArg
from mica.cli.snapshot_verbs import pause
from mica.cli.vm_show import address, publish_text
from mica.client import Client
from mica.client.vms import vm_id
from mica.model.errors import MicaError
from mica.model.operation import Operation
from mica.model.views import ForkAccepted, VmFork, VmView


class Copy(NamedTuple):
    """One that runs, and how long that took from the request on, in seconds."""

    view: VmView
    took_s: float


async def fork(
    vm: VmArg,
    /,
    *,
    count: int = 1,
    name: str = "",
    snapshot: SnapshotArg = "",
    overcommit: Flag = False,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> int:
    """Make running copies of a VM in a moment, memory and all. The VM itself goes on.

    Each copy is a machine of its own: its random numbers and MAC addresses differ before it runs, its hostname and
    keys soon after. Ports are published anew, at ports that the host chooses.

    Parameters
    ----------
    vm
        Name or id of the VM.
    count
        How many copies, up to 100.
    name
        Name of the copy, or the beginning of the names when there are several.
    snapshot
        Copy the VM as it was at this snapshot, instead of as it is now.
    overcommit
        Insist where the host's memory does not suffice.
    """
    from mica.cli.main import report

    async with ctx.client() as client:
        body = VmFork(count=count, name=name, snapshot=snapshot, overcommit=overcommit)
        accepted = await client.snapshots.fork(vm, body)
        results = await asyncio.gather(
            *(ctx.wait(client, operation, cancel=True) for operation in accepted.operations), return_exceptions=True
        )
        failed = await _failures(client, accepted, results)
        done = [result for result in results if isinstance(result, Operation)]
        copies = [Copy(await client.vms.view(vm_id(operation)), _took(operation)) for operation in done]
        stood = await _stood(client, accepted)
    ctx.emit(_plain(copies, stood), lambda: _text(vm, copies, stood))
    for error in failed:
        report(ctx.world, error, ctx.json)
    return failed[0].info.exit_status if failed else 0


async def _failures(client: Client, accepted: ForkAccepted, results: list[Any]) -> list[MicaError]:
    """What to tell of those that came to nothing: one reason for all where they had no moment to begin at."""
    failed = [result for result in results if isinstance(result, MicaError)]
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, MicaError):
            raise result
    if failed and accepted.freeze is not None:
        try:
            await client.operations.wait(accepted.freeze.id)
        except MicaError as reason:
            return [reason]
    return failed


def _took(operation: Operation) -> float:
    return max(0.0, (operation.ended_at or operation.created_at) - operation.created_at)


async def _stood(client: Client, accepted: ForkAccepted) -> dict[str, Any]:
    """How long the VM stood still for it, in seconds, and what it lost; ``None`` where it did not, or where nobody can
    say yet."""
    result = {} if accepted.freeze is None else (await client.operations.get(accepted.freeze.id)).result
    return {"pause_s": result.get("pause_s"), "lost": result.get("lost", [])}


def _plain(copies: list[Copy], stood: dict[str, Any]) -> dict[str, Any]:
    return {**stood, "copies": [{"took_s": copy.took_s, "vm": copy.view} for copy in copies]}


def _text(vm: str, copies: list[Copy], stood: dict[str, Any]) -> str:
    lines = []
    for copy in copies:
        where = address(copy.view)
        at = "" if where == "-" else f" at {where}"
        lines.append(f"{copy.view.name} is {copy.view.observed.state}{at} after {copy.took_s:.2f} s")
        lines += [f"  {publish_text(publish)}" for nic in copy.view.nics for publish in nic.publish]
    return "\n".join([*lines, *pause(vm, **stood)])
