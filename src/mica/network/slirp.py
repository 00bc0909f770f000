"""QEMU's own user mode (slirp), the reduced way out of a VM where passt cannot be had.

slirp is a part of QEMU. So QEMU has to sit in the host's network namespace, and the guest's connections end with its
QEMU. Worse, slirp takes whatever is sent to its gateway address to the host's loopback (libslirp, ``sotranslate_out``),
and opens a connection to 127.0.0.1 when a frame names it. No option of QEMU shuts that alone: ``restrict=on`` shuts the
way out too. So a VM on slirp is told as reduced, and root has to ask for it: as root, what listens on the loopback
trusts the host's own users, and a guest is none.
"""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_address
from pathlib import Path
from typing import Any

import msgspec

from mica.model.errors import Code, MicaError, invalid
from mica.model.vm import Publish
from mica.network.addresses import NicAddresses

KIND = "user"
# The values of the setting ``slirp``; without one, root is refused and other users are not.
ALLOW, REFUSE = "allow", "refuse"
_UNPRIVILEGED_PORTS = "sys/net/ipv4/ip_unprivileged_port_start"


class Slirp(msgspec.Struct, frozen=True):
    """Leave to use slirp. ``why`` is what is the matter with passt."""

    why: str

    @property
    def costs(self) -> str:
        """What a host without passt has less, for ``doctor``."""
        return (
            "VMs use QEMU's own user mode: their QEMU is in the host's network namespace, guests reach services on the "
            "host's loopback, and connections end with their QEMU"
        )


def permit(lack: MicaError, *, setting: str, root: bool, built_in: bool) -> Slirp:
    """Leave to use slirp in place of the passt that ``lack`` is about.

    ``built_in`` says whether QEMU has ``-netdev user`` at all. Raises ``lack``, with this way out in its hint where
    there is one.
    """
    if lack.code not in (Code.HOST_LACKS, Code.COMMAND_FAILED):
        raise lack
    if not built_in:
        raise _with_hint(lack, "this QEMU was built without a user mode of its own (slirp)")
    if setting == REFUSE or (root and setting != ALLOW):
        what = "QEMU's own user mode, through which guests reach services on this host's loopback, is refused"
        raise _with_hint(lack, f"{what} {'by a setting' if setting == REFUSE else 'to root'}: setting slirp = {ALLOW}")
    return Slirp(lack.message)


def _with_hint(lack: MicaError, more: str) -> MicaError:
    hint = f"{lack.hint}; {more}" if lack.hint else more
    return MicaError(lack.code, lack.message, hint=hint, retryable=lack.retryable, details=lack.details)


def check(publish: tuple[Publish, ...], proc: Path = Path("/proc")) -> None:
    """Ports that passt would publish and a jailed QEMU cannot. Raises ``invalid`` and ``forbidden``."""
    first = _first_port(proc)
    for wish in publish:
        if ip_address(wish.host_address).version != 4:
            raise invalid(
                f"QEMU's own user mode cannot publish port {wish.guest_port} on {wish.host_address}",
                hint="publish on an IPv4 address such as 127.0.0.1, or install passt",
            )
        if wish.host_port < first:
            raise MicaError(
                Code.FORBIDDEN,
                f"{wish.protocol} port {wish.host_port} is below {first}, and QEMU's own user mode has no right to it",
                hint=f"publish on a port from {first} on, or install passt",
            )


def _first_port(proc: Path) -> int:
    try:
        return int((proc / _UNPRIVILEGED_PORTS).read_text(encoding="ascii"))
    except FileNotFoundError:
        return 1024


def handle(given: NicAddresses, publish: tuple[Publish, ...], *, ipv6: bool) -> dict[str, Any]:
    """What the hypervisor writes out as ``-netdev user``."""
    interface = IPv4Interface(given.address)
    six = IPv6Interface(given.address6)
    return {
        "kind": KIND,
        "network": str(interface.network),
        "address": str(interface.ip),
        "gateway": given.gateway,
        "dns": given.dns,
        "network6": str(IPv6Address(six.network.network_address)) if ipv6 else "",
        "publish": msgspec.to_builtins(publish),
    }


def reduced(slirp: Slirp, nic: str, given: NicAddresses) -> tuple[str, ...]:
    """What is less than with passt, for ``vm show``."""
    return (
        f"{nic} is on QEMU's own user mode instead of passt: QEMU is in the host's network namespace, the guest "
        f"reaches services on the host's loopback (at {given.gateway}), and its connections end with its QEMU "
        f"({slirp.why})",
    )
