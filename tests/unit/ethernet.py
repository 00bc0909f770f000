"""The guest's side of a passt socket, in a few lines: enough Ethernet, IPv4, UDP, DHCP and TCP to ask questions.

passt speaks Ethernet frames over a stream socket, each after its length in 32 bits, big-endian (passt(1)). DHCP is
RFC 2131. For tests only: one connection at a time, no retransmission.
"""

from __future__ import annotations

import asyncio
import struct
from ipaddress import IPv4Address
from typing import Self

from mica.network import frames

BROADCAST = b"\xff" * 6
SYN, RST, ACK, PSH, FIN = 0x02, 0x04, 0x10, 0x08, 0x01


class Lease:
    """What DHCP gave."""

    def __init__(self, address: IPv4Address, options: dict[int, bytes]) -> None:
        self.address = address
        self.mask = IPv4Address(options[1])
        self.router = IPv4Address(options[3])
        dns = options.get(6, b"")
        self.dns = [IPv4Address(dns[i : i + 4]) for i in range(0, len(dns), 4)]


class Wire:
    """A guest plugged into a passt socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mac: str) -> None:
        self._reader, self._writer = reader, writer
        self.mac = bytes.fromhex(mac.replace(":", ""))
        self.peer = BROADCAST
        self.address = IPv4Address(0)
        self._port = 40000

    @classmethod
    async def plug(cls, path: str, mac: str = "52:00:00:00:00:01") -> Self:
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, mac)

    async def unplug(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def send(self, frame: bytes) -> None:
        self._writer.write(struct.pack("!I", len(frame)) + frame)
        await self._writer.drain()

    async def receive(self) -> bytes:
        """The next frame; ARP requests for our address are answered on the way."""
        while True:
            (size,) = struct.unpack("!I", await self._reader.readexactly(4))
            frame = await self._reader.readexactly(size)
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x01" and frame[38:42] == self.address.packed:
                answer = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + self.mac + self.address.packed + frame[22:32]
                await self.send(frame[6:12] + self.mac + b"\x08\x06" + answer)
                continue
            return frame

    async def _ip(self, protocol: int, destination: IPv4Address, payload: bytes) -> None:
        await self.send(frames.ethernet(self.address, destination, protocol, payload, macs=(self.peer, self.mac)))

    async def _packet(self, protocol: int, port: int) -> tuple[IPv4Address, bytes]:
        """The next IPv4 payload of that protocol to our port, and who sent it."""
        while True:
            frame = await self.receive()
            if frame[12:14] != b"\x08\x00" or frame[23] != protocol:
                continue
            ip = frame[14 : 14 + struct.unpack("!H", frame[16:18])[0]]
            payload = ip[(ip[0] & 15) * 4 :]
            if struct.unpack("!H", payload[2:4])[0] == port:
                if self.peer == BROADCAST:
                    self.peer = frame[6:12]
                return IPv4Address(ip[12:16]), payload

    async def udp(self, destination: IPv4Address, port: int, data: bytes, source: int = 40000) -> None:
        head = struct.pack("!HHHH", source, port, 8 + len(data), 0)
        await self._ip(frames.UDP, destination, head + data)

    async def udp_receive(self, port: int = 40000) -> tuple[IPv4Address, bytes]:
        sender, payload = await self._packet(17, port)
        return sender, payload[8:]

    async def dhcp(self) -> Lease:
        """Ask as a client without any address."""

        async def ask(kind: int) -> Lease:
            options = bytes([53, 1, kind, 55, 3, 1, 3, 6, 255])
            head = struct.pack("!BBBBIHH16s", 1, 1, 6, 0, 0x4D494341, 0, 0x8000, b"") + self.mac.ljust(16, b"\0")
            body = head + bytes(192) + b"\x63\x82\x53\x63" + options
            await self.udp(IPv4Address("255.255.255.255"), 67, body.ljust(300, b"\0"), source=68)
            _, answer = await self.udp_receive(68)
            found, rest = {}, answer[240:]
            while rest and rest[0] != 255:
                found[rest[0]] = rest[2 : 2 + rest[1]]
                rest = rest[2 + rest[1] :]
            return Lease(IPv4Address(answer[16:20]), found)

        await ask(1)
        lease = await ask(3)
        self.address = lease.address
        return lease

    async def _segment(
        self, destination: IPv4Address, ports: tuple[int, int], flags: int, seq: int, ack: int, data: bytes = b""
    ) -> None:
        head = struct.pack("!HHIIBBHHH", *ports, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, flags, 65535, 0, 0)
        await self._ip(frames.TCP, destination, head + data)

    async def _segment_receive(self, port: int) -> tuple[IPv4Address, int, int, int, int, bytes]:
        """(sender, its port, flags, sequence, acknowledged, data)"""
        sender, payload = await self._packet(6, port)
        source, _, seq, ack, offset, flags = struct.unpack("!HHIIBB", payload[:14])
        return sender, source, flags, seq, ack, payload[(offset >> 4) * 4 :]

    async def tcp_connect(self, destination: IPv4Address, port: int) -> str:
        """``open``, ``refused`` or ``silent`` (after half a second)."""
        self._port += 1
        ports = (self._port, port)
        await self._segment(destination, ports, SYN, 1000, 0)
        try:
            async with asyncio.timeout(0.5):
                _, _, flags, seq, _, _ = await self._segment_receive(self._port)
        except TimeoutError:
            return "silent"
        if flags & RST:
            return "refused"
        await self._segment(destination, ports, RST | ACK, 1001, seq + 1)
        return "open"

    async def tcp_serve(self, port: int, answer: bytes) -> bytes:
        """Take one connection, read one segment, send ``answer``, and return what was read."""
        sender, source, flags, seq, _, _ = await self._segment_receive(port)
        assert flags & SYN
        ports = (port, source)
        await self._segment(sender, ports, SYN | ACK, 5000, seq + 1)
        data = b""
        while not data:
            _, _, flags, seq, _, data = await self._segment_receive(port)
        await self._segment(sender, ports, ACK | PSH | FIN, 5001, seq + len(data), answer)
        return data
