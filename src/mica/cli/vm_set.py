"""``mica vm set``."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from mica.cli.context import Context
from mica.cli.options import DEFAULTS, Duration, Hidden, Many, Options, Size, VmArg
from mica.cli.values import pairs, words
from mica.client.vms import parse_publish, vm_id
from mica.model.errors import invalid
from mica.model.views import VmSet, VmView

Switch = bool | None


async def set_(
    vm: VmArg,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    label: Many = (),
    unlabel: Many = (),
    cpus: int | None = None,
    memory: Size | None = None,
    cpu_limit: str | None = None,
    cpu_model: str | None = None,
    publish: Annotated[Many, Parameter(name=["--publish", "-p"], negative=())] = (),
    unpublish: Annotated[tuple[int, ...], Parameter(negative=())] = (),
    boot: str | None = None,
    autostart: Annotated[Switch, Parameter(negative="--no-autostart")] = None,
    protected: Annotated[Switch, Parameter(negative="--no-protected")] = None,
    display: Annotated[Switch, Parameter(negative="--no-display")] = None,
    last_valid: Annotated[Switch, Parameter(negative="--no-last-valid")] = None,
    stop_timeout: Duration | None = None,
    if_generation: int | None = None,
    options: Options = DEFAULTS,
    ctx: Annotated[Context, Hidden],
) -> None:
    """Change a VM. What needs a restart is said and stays pending until then.

    Parameters
    ----------
    vm
        Name or id of the VM.
    name
        Its new name, a DNS label.
    description
        Free text about it.
    label
        Set a label, as KEY=VALUE; may be repeated.
    unlabel
        Remove the label with this key; may be repeated.
    cpus
        Number of vCPUs.
    memory
        Memory, for example 512M or 2G.
    cpu_limit
        Host processors that it may use at most (0.5 is half of one), or none.
    cpu_model
        QEMU's CPU model.
    publish
        Make a guest port reachable on this host: HOST:GUEST, ADDRESS:HOST:GUEST, with /udp; may be repeated.
    unpublish
        Take back the publishing of this guest port; may be repeated.
    boot
        Names of disks and NICs in the order in which they are tried, with commas between.
    autostart
        Start it when the daemon of this host starts.
    protected
        Refuse to delete it.
    display
        A screen (headless until somebody looks).
    last_valid
        Where damage keeps it from starting, go back to its last valid snapshot each time, without being told to.
    stop_timeout
        How long the guest may take to shut down before it is forced, for example 90s.
    if_generation
        Only if it has not changed since this generation: see mica vm show --json.
    """
    fields: dict[str, Any] = {
        "name": name,
        "description": description,
        "cpus": cpus,
        "memory": memory,
        "cpu_model": cpu_model,
        "boot": None if boot is None else words(boot),
        "autostart": autostart,
        "protected": protected,
        "display": display,
        "last_valid": last_valid,
        "stop_timeout_s": stop_timeout,
        "labels": _labels(label, unlabel),
    }
    fields = {key: value for key, value in fields.items() if value is not None}
    if cpu_limit is not None:
        fields["cpu_limit"] = _limit(cpu_limit)
    async with ctx.client() as client:
        if publish or unpublish:
            view = await client.vms.view(vm)
            fields["nics"] = _republish(view, publish, unpublish)
            # The NICs were read and are written back whole: nobody may have changed them in between.
            if_generation = view.generation if if_generation is None else if_generation
        if not fields:
            raise invalid(f"nothing to change about {vm}", hint="see: mica vm set --help")
        submit = client.vms.set(vm, VmSet(**fields), if_match=if_generation, wait=False)
        operation = await ctx.perform(client, submit)
        view = await client.vms.view(vm_id(operation))
    ctx.emit(view, lambda: _outcome(view))


def _labels(label: Many, unlabel: Many) -> dict[str, str | None] | None:
    if not label and not unlabel:
        return None
    return {**dict.fromkeys(unlabel, None), **pairs(label, "label")}


def _limit(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise invalid(f"CPU limit {text!r} is not a number", hint="write for example 0.5 or 2, or none") from None


def _republish(view: VmView, publish: Many, unpublish: tuple[int, ...]) -> Any:
    from msgspec.structs import replace

    if not view.spec.nics:
        raise invalid(f"{view.name} has no NIC to publish ports of")
    first, *others = view.spec.nics
    known = [item.guest_port for item in first.publish]
    for port in unpublish:
        if port not in known:
            there = ", ".join(map(str, known)) or "none"
            raise invalid(f"guest port {port} of {view.name} is not published", hint=f"published are: {there}")
    kept = tuple(item for item in first.publish if item.guest_port not in unpublish)
    return (replace(first, publish=kept + tuple(parse_publish(text) for text in publish)), *others)


def _outcome(view: VmView) -> str:
    if not view.pending:
        return f"{view.name} is changed"
    fields = ", ".join(view.pending)
    return f"{view.name} is changed; pending until it restarts: {fields} (mica vm restart {view.name})"
