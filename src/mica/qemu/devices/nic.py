"""A virtio NIC, joined to whatever the network adapter made for it.

``stream``: the VM's own network process listens on a UNIX socket (passt); QEMU itself sits in an empty network
namespace. ``user``: QEMU does it itself (slirp), for which it has to be in the host's network namespace. ``none``: a
NIC whose cable is not plugged in; no option says so, so it is pulled by QMP before the guest runs.
"""

from __future__ import annotations

from typing import Any

from mica.model.errors import Code, MicaError
from mica.model.vm import NicRuntime, NicSpec
from mica.qemu.arguments import Arguments, Bus, concat, from_json


def device(name: str) -> str:
    """The id of a NIC's device."""
    return f"dev-{name}"


def unplug(nic: NicSpec) -> dict[str, Any]:
    """Arguments of ``set_link`` (QMP reference): pull the cable out."""
    return {"name": device(nic.name), "up": False}


def needs_host_network(runtime: NicRuntime) -> bool:
    """Whether QEMU itself opens the sockets for this NIC."""
    return runtime.handle.get("kind") == "user"


def _user(backend: str, handle: dict[str, Any]) -> dict[str, Any]:
    """``-netdev user`` (QMP reference, NetdevUserOptions); what the host's IPv6 cannot carry is not offered."""
    network6 = handle["network6"]
    return {
        "type": "user",
        "id": backend,
        "ipv4": True,
        "net": handle["network"],
        "host": handle["gateway"],
        "dns": handle["dns"],
        "dhcpstart": handle["address"],
        "ipv6": bool(network6),
        "ipv6-prefix": network6 or None,
        "ipv6-prefixlen": 64 if network6 else None,
        "hostfwd": [{"str": _forward(publish, handle["address"])} for publish in handle["publish"]] or None,
    }


def _forward(publish: dict[str, Any], address: str) -> str:
    here = f"{publish['protocol']}:{publish['host_address']}:{publish['host_port']}"
    return f"{here}-{address}:{publish['guest_port']}"


def _backend(runtime: NicRuntime) -> dict[str, Any] | None:
    """What the NIC is joined to; ``None`` when that is nothing."""
    backend = f"net-{runtime.name}"
    match runtime.handle.get("kind", "none"):
        case "stream":
            address = {"type": "unix", "path": runtime.handle["socket"]}
            return {"type": "stream", "id": backend, "server": False, "addr": address}
        case "user":
            return _user(backend, runtime.handle)
        case "none":
            return None
        case kind:
            raise MicaError(Code.INTERNAL, f"NIC {runtime.name} is attached in an unknown way: {kind}")


def past(count: int) -> list[Arguments]:
    """Networks of QEMU's own that nobody is on: with theirs the state of a machine that had as many can be loaded, in
    which each has its part (libslirp's ``slirp``). :func:`leave_past` takes them away."""
    return [from_json("netdev", {"type": "user", "id": name, "restrict": True}) for name in leave_past(count)]


def leave_past(count: int) -> list[str]:
    """Ids for ``netdev_del``, to be taken away before a NIC joins the network it is on now."""
    return [f"past-{number}" for number in range(count)]


def join(runtime: NicRuntime, *, hub: int) -> list[dict[str, Any]]:
    """Arguments of ``netdev_add`` that plug in a NIC which began on a hub alone."""
    net = _backend(runtime)
    if net is None:
        return []
    plain = {key: value for key, value in net.items() if value is not None}
    return [plain, {"type": "hubport", "id": f"join-{runtime.name}", "hubid": hub, "netdev": net["id"]}]


def arguments(
    nic: NicSpec, runtime: NicRuntime, bus: Bus, *, hub: int, bootindex: int | None, apart: bool = False
) -> Arguments:
    """``hub`` is a number that no other NIC of the VM has. ``apart``: it is plugged in later, by :func:`join`."""
    backend = f"net-{nic.name}"
    net = None if apart else _backend(runtime)
    if net is None:
        # A hub of its own with nobody else on it: two such NICs must not meet.
        backend = f"hub-{nic.name}"
        net = {"type": "hubport", "id": backend, "hubid": hub}
    port, place = bus.port()
    front = {
        "driver": "virtio-net-pci",
        "id": device(nic.name),
        "netdev": backend,
        "mac": nic.mac,
        "bootindex": bootindex,
        # The network boot ROM is loaded only for a NIC that is booted from.
        "romfile": None if bootindex is not None else "",
        **place,
    }
    return concat([from_json("netdev", net), port, from_json("device", front)])
