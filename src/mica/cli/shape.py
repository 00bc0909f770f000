"""What a new VM is made of, as options: shared by ``mica run`` and ``mica vm create``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter

from mica.cli.options import Duration, Flag, Many, Size
from mica.cli.values import pairs
from mica.model.image import Firmware
from mica.model.vm import Machine, NetworkKind, NicSpec

SHAPE = Group("The machine", sort_key=10)


@Parameter(name="*", group=SHAPE)
@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is left out comes from the image."""

    name: str = ""
    """Its name, a DNS label; one is made from the image's name by default."""

    cpus: int | None = None
    """Number of vCPUs."""

    memory: Size | None = None
    """Memory, for example 512M or 2G."""

    disk: Size | None = None
    """Size of the root disk, for example 8G; at least the image's."""

    publish: Annotated[Many, Parameter(name=["--publish", "-p"], negative=())] = ()
    """Make a guest port reachable on this host: HOST:GUEST, ADDRESS:HOST:GUEST, with /udp; may be repeated."""

    network: NetworkKind = NetworkKind.USER
    """user: outbound access of its own, no privileges needed; none: a NIC with no link."""

    label: Many = ()
    """A label, as KEY=VALUE; may be repeated."""

    description: str = ""
    """Free text about it."""

    machine: Machine = Machine.Q35
    """The board: q35, or minimal (starts quicker, direct boot only)."""

    firmware: Firmware | None = None
    """bios or uefi."""

    cpu_limit: float | None = None
    """Host processors that it may use at most: 0.5 is half of one."""

    hostname: str = ""
    """The guest's own name, where the guest asks for it; the VM's name by default."""

    stop_timeout: Duration | None = None
    """How long the guest may take to shut down before it is forced, for example 90s."""

    autostart: Flag = False
    """Start it when the daemon of this host starts."""

    protected: Flag = False
    """Refuse to delete it."""

    display: Annotated[bool, Parameter(negative="--no-display")] = True
    """A screen (headless until somebody looks)."""

    overcommit: Flag = False
    """Insist where the host's memory does not suffice."""

    def fields(self) -> dict[str, Any]:
        """Keyword arguments for :func:`mica.client.vms.make_create` and :meth:`mica.Client.run`."""
        out: dict[str, Any] = {
            "name": self.name,
            "cpus": self.cpus,
            "memory": self.memory,
            "disk": self.disk,
            "publish": self.publish,
            "labels": pairs(self.label, "label"),
            "description": self.description,
            "machine": self.machine,
            "firmware": self.firmware,
            "cpu_limit": self.cpu_limit,
            "hostname": self.hostname,
            "autostart": self.autostart,
            "protected": self.protected,
            "display": self.display,
            "overcommit": self.overcommit,
        }
        if self.stop_timeout is not None:
            out["stop_timeout_s"] = self.stop_timeout
        if self.network is NetworkKind.NONE:
            out["nics"] = (NicSpec(network=NetworkKind.NONE),)
        return out


NO_SHAPE = Shape()
