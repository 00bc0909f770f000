"""A sieve between a guest and a passt that would take it to the host's loopback.

passt before 2024 opens a connection to whatever address a frame names, 127.0.0.1 included: an honest guest's kernel
never sends such a frame, a hostile one does. This program stands between QEMU's socket and passt's, lets through what
is ARP, IPv4 or IPv6 and neither from nor to an address that means "this host", and drops the rest. It is started only
where :mod:`mica.network.proof` has shown that passt needs it. The frames that come from passt are passed on unread.

The same releases have a second fault: of a connection to a published port they do not send the last segment of the
handshake until the client has said something, so a server that speaks first (mail, databases, FTP) never hears of its
client. The sieve sends that segment for them.

It runs as a program of its own (``python -I -S sieve.py LISTEN PASST [UID GID]``) and imports the standard library
only: it lives as long as its VM, not as long as the daemon. One guest at a time; when it leaves, the next may come.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys

_IPV4, _ARP, _IPV6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"
_MAX_FRAME = 65535 + 18
_READ = 1 << 18
_BUFFER = 1 << 20
_ANSWERS = 1 << 14
_TCP = 6
_SYN, _RST, _ACK = 0x02, 0x04, 0x10


def harmless(frame: bytes) -> bool:
    """Whether a frame of the guest may reach passt: an address that means the host itself is never harmless."""
    kind = frame[12:14]
    if kind == _IPV4:
        # 127.0.0.0/8 is loopback, 0.0.0.0/8 "this host" (RFC 6890); a DHCP client asks from 0.0.0.0 rightly.
        return len(frame) >= 34 and frame[26] != 127 and frame[30] not in (0, 127)
    if kind == _IPV6:
        # ::/96 holds the unspecified address, loopback and IPv4-compatible ones; ::ffff:0:0/96 are IPv4 in disguise
        # (RFC 4291). Neighbour discovery asks from :: rightly.
        if len(frame) < 54:
            return False
        source, destination = frame[22:38], frame[38:54]
        return not _disguised(destination) and (source == bytes(16) or not _disguised(source))
    return kind == _ARP


def _disguised(address: bytes) -> bool:
    return address[:10] == bytes(10) and address[10:12] in (b"\0\0", b"\xff\xff")


def completed(frame: bytes) -> bytes:
    """The segment that completes the handshake of which ``frame`` is the second one (RFC 9293, section 3.5).

    It has its length before it; empty for any other frame. passt may send the same later, which does no harm.
    """
    kind = frame[12:14]
    if kind == _IPV4 and len(frame) >= 54 and frame[14] == 0x45 and frame[23] == _TCP:
        addresses, tcp = frame[30:34] + frame[26:30], frame[34:54]
        pseudo = addresses + struct.pack("!BBH", 0, _TCP, 20)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, _TCP, 0) + addresses
        head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
    elif kind == _IPV6 and len(frame) >= 74 and frame[20] == _TCP:
        addresses, tcp = frame[38:54] + frame[22:38], frame[54:74]
        pseudo = addresses + struct.pack("!IHBB", 20, 0, 0, _TCP)
        head = struct.pack("!IHBB", 6 << 28, 20, _TCP, 64) + addresses
    else:
        return b""
    source, target, sequence, acknowledged, _, flags = struct.unpack("!HHIIBB", tcp[:14])
    if flags & (_SYN | _ACK | _RST) != _SYN | _ACK:
        return b""
    # A window that is right whether it is scaled or not; passt's own segments tell the real one.
    answer = [target, source, acknowledged, (sequence + 1) & 0xFFFFFFFF, 0x50, _ACK, 1024, 0, 0]
    answer[7] = _checksum(pseudo + struct.pack("!HHIIBBHHH", *answer))
    out = frame[6:12] + frame[0:6] + kind + head + struct.pack("!HHIIBBHHH", *answer)
    return struct.pack("!I", len(out)) + out


def _checksum(data: bytes) -> int:
    """RFC 1071; ``data`` is of even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Frames:
    """Finds where the frames of a stream end; what is left of one is kept for the next time."""

    def __init__(self) -> None:
        self._rest = b""

    def whole(self, data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
        """Whole frames with their lengths before them, and begin and end of each frame in that.

        Raises ``ValueError`` when the stream is no stream of frames.
        """
        data = self._rest + data
        at, size, places = 0, len(data), []
        while size - at >= 4:
            length = int.from_bytes(data[at : at + 4], "big")
            if length > _MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes")
            end = at + 4 + length
            if end > size:
                break
            places.append((at + 4, end))
            at = end
        self._rest = data[at:]
        return data[:at], places


class Sifter:
    """Keeps the harmless frames of the guest's stream, with their lengths, in order.

    ``answers`` are what the guest is to be sent for them; whoever sends it empties it.
    """

    def __init__(self) -> None:
        self._frames = Frames()
        self.answers = b""

    def sift(self, data: bytes) -> bytes:
        """What may go on to passt. Raises ``ValueError`` when the stream is no stream of frames."""
        data, places = self._frames.whole(data)
        out = []
        for start, end in places:
            frame = data[start:end]
            if harmless(frame):
                out.append(data[start - 4 : end])
                # No more than a little, however many a guest forges and however little it reads.
                if len(self.answers) < _ANSWERS:
                    self.answers += completed(frame)
        return b"".join(out)


def _relay(guest: socket.socket, passt: socket.socket) -> None:
    """Copy both ways until either side leaves; neither side is read while the other has not taken what was read."""
    sifter, frames = Sifter(), Frames()
    waiting = {guest: b"", passt: b""}  # what is still to be written to each
    other = {guest: passt, passt: guest}
    for side in waiting:
        side.setblocking(False)
    poll = select.poll()
    sides = {side.fileno(): side for side in waiting}
    while True:
        for number, side in sides.items():
            reading = select.POLLIN if len(waiting[other[side]]) < _BUFFER else 0
            poll.register(number, reading | (select.POLLOUT if waiting[side] else 0))
        for number, events in poll.poll():
            side = sides[number]
            if not events & select.POLLIN and events & (select.POLLHUP | select.POLLERR):
                return
            if events & select.POLLIN:
                try:
                    data = side.recv(_READ)
                except BlockingIOError:
                    continue
                if not data:
                    return
                # Whole frames only, so that an answer of ours never falls into the middle of one of passt's.
                waiting[other[side]] += sifter.sift(data) if side is guest else frames.whole(data)[0]
                if len(waiting[guest]) < _BUFFER:
                    waiting[guest] += sifter.answers
                sifter.answers = b""
            for target in waiting:
                if waiting[target]:
                    try:
                        waiting[target] = waiting[target][target.send(waiting[target]) :]
                    except BlockingIOError:
                        continue


def main(listen: str, passt: str, *owner: str) -> None:
    if owner:
        uid, gid = map(int, owner)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(listen)
        server.listen(1)
        while True:
            guest, _ = server.accept()
            with guest, socket.socket(socket.AF_UNIX) as upstream:
                try:
                    upstream.connect(passt)
                    _relay(guest, upstream)
                except (OSError, ValueError) as error:
                    print(f"sieve: {error}", file=sys.stderr, flush=True)  # noqa: T201 - its log


if __name__ == "__main__":
    main(*sys.argv[1:])
