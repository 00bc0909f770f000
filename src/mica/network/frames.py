"""Ethernet frames by hand, as a hostile guest would forge them, to prove what a network process lets through.

Checksums are RFC 1071, headers RFC 791, 8200, 768 and 9293. On passt's stream socket every frame follows its length
in 32 bits, big-endian (passt(1); the same as QEMU's ``-netdev stream``).
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address

TCP, UDP = 6, 17
SYN = 0x02
_CHECKSUM_AT = {TCP: 16, UDP: 6}


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn(source: Address, destination: Address, source_port: int, port: int) -> bytes:
    """A TCP connection's first segment."""
    segment = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 0x50, SYN, 65535, 0, 0)
    return framed(ethernet(source, destination, TCP, segment))


def datagram(source: Address, destination: Address, source_port: int, port: int, data: bytes) -> bytes:
    """A UDP datagram."""
    return framed(ethernet(source, destination, UDP, struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data))


def framed(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


def ethernet(
    source: Address,
    destination: Address,
    protocol: int,
    payload: bytes,
    *,
    macs: tuple[bytes, bytes] = (b"\xff" * 6, b"\x52\0\0\0\0\1"),
) -> bytes:
    """A whole frame; ``macs`` are destination and source. Both addresses are of one family."""
    addresses = source.packed + destination.packed
    if isinstance(source, IPv4Address):
        pseudo = addresses + struct.pack("!BBH", 0, protocol, len(payload))
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + addresses
        head, kind = head[:10] + struct.pack("!H", checksum(head)) + head[12:], 0x0800
    else:
        pseudo = addresses + struct.pack("!IHBB", len(payload), 0, 0, protocol)
        head, kind = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + addresses, 0x86DD
    at = _CHECKSUM_AT[protocol]
    total = checksum(pseudo + payload) or 0xFFFF
    return b"".join(macs) + struct.pack("!H", kind) + head + payload[:at] + struct.pack("!H", total) + payload[at + 2 :]
