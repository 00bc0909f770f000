"""A sieve between a guest and a passt that would take it to the host's loopback.

passt before 2024 opens a connection to whatever address a frame names, 127.0.0.1 included: an honest guest's kernel
never sends such a frame, a hostile one does. This program stands between QEMU's socket and passt's, lets through what
is ARP, IPv4 or IPv6 and neither from nor to an address that means "this host", and drops the rest. It is started only
where :mod:`mica.network.proof` has shown that passt needs it. What comes from passt is passed on unread.

It runs as a program of its own (``python -I -S sieve.py LISTEN PASST [UID GID]``) and imports the standard library
only: it lives as long as its VM, not as long as the daemon. One guest at a time; when it leaves, the next may come.
"""

from __future__ import annotations

import os
import select
import socket
import sys

_IPV4, _ARP, _IPV6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"
_MAX_FRAME = 65535 + 18
_READ = 1 << 18
_BUFFER = 1 << 20


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


class Sifter:
    """Cuts the guest's stream into frames and keeps the harmless ones, with their lengths, in order."""

    def __init__(self) -> None:
        self._rest = b""

    def sift(self, data: bytes) -> bytes:
        """What may go on to passt. Raises ``ValueError`` when the stream is no stream of frames."""
        data = self._rest + data
        at, size, out = 0, len(data), []
        while size - at >= 4:
            length = int.from_bytes(data[at : at + 4], "big")
            if length > _MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes")
            end = at + 4 + length
            if end > size:
                break
            if harmless(data[at + 4 : end]):
                out.append(data[at:end])
            at = end
        self._rest = data[at:]
        return b"".join(out)


def _relay(guest: socket.socket, passt: socket.socket) -> None:
    """Copy both ways until either side leaves; neither side is read while the other has not taken what was read."""
    sifter = Sifter()
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
                waiting[other[side]] += sifter.sift(data) if side is guest else data
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
