"""Addresses that Mica makes up: a private network for every user-mode NIC.

All are pure functions of the VM and the NIC, so nothing has to be stored, found or given back. A slot (below 16384)
has 8 NICs, each with 8 IPv4 addresses out of a /12 that the host does not route to, and a /64 of its own out of the
unique local range (RFC 4193) for IPv6.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface
from pathlib import Path

import msgspec

from mica.model.errors import invalid
from mica.model.mac import mac_address
from mica.model.vm import MAX_NICS

SLOTS = 16384
_NIC_PREFIX = 29
_PER_NIC = 2 ** (32 - _NIC_PREFIX)
# Private (RFC 1918) and shared (RFC 6598) space, the parts that home and office networks use least first.
_CANDIDATES = tuple(IPv4Network(text) for text in ("10.64.0.0/12", "10.208.0.0/12", "172.16.0.0/12", "100.64.0.0/12"))
_IPV6_BASE = int(IPv6Address("fd4d:6963:6100::"))


class NicAddresses(msgspec.Struct, frozen=True):
    """What one user-mode NIC is given, as text: the guest's addresses with their prefix, router and DNS forwarder."""

    address: str
    gateway: str
    dns: str
    address6: str
    gateway_mac: str


def nic_addresses(pool: IPv4Network, slot: int, nic: int) -> NicAddresses:
    """The network of NIC number ``nic`` of the VM in ``slot``. Raises ``invalid`` out of range."""
    if not (0 <= slot < SLOTS and 0 <= nic < MAX_NICS):
        raise invalid(f"no addresses for slot {slot} (0 to {SLOTS - 1}), NIC {nic} (0 to {MAX_NICS - 1})")
    number = slot * MAX_NICS + nic
    base = int(pool.network_address) + number * _PER_NIC
    return NicAddresses(
        address=str(IPv4Interface((base + 2, _NIC_PREFIX))),
        gateway=str(IPv4Address(base + 1)),
        dns=str(IPv4Address(base + 3)),
        address6=str(IPv6Interface((_IPV6_BASE + (number << 64) + 2, 64))),
        gateway_mac=mac_address("router", str(number)),
    )


def choose_pool(routes: list[IPv4Network]) -> IPv4Network:
    """The first candidate that no route of the host touches; if all are taken, the one least often.

    A guest cannot reach hosts in the few addresses around its own, which is why the pool avoids the host's networks.
    """
    inside = [route for route in routes if route.prefixlen > 0]
    return min(_CANDIDATES, key=lambda pool: sum(pool.overlaps(route) for route in inside))


def read_routes(proc: Path = Path("/proc")) -> list[tuple[str, IPv4Network]]:
    """(interface, destination) of the host's IPv4 routes that are up; /proc/net/route, host byte order (proc(5))."""
    out = []
    for line in _lines(proc / "net/route")[1:]:
        fields = line.split()
        if int(fields[3], 16) & 1:
            destination, mask = (int.from_bytes(bytes.fromhex(fields[i]), "little") for i in (1, 7))
            out.append((fields[0], IPv4Network((destination & mask, mask.bit_count()))))
    return out


def ipv6_default(proc: Path = Path("/proc")) -> str | None:
    """The interface of the host's IPv6 default route; ``None`` without one (/proc/net/ipv6_route)."""
    for line in _lines(proc / "net/ipv6_route"):
        fields = line.split()
        if fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo" and int(fields[8], 16) & 1:
            return fields[9]
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:  # a kernel without that protocol
        return []
