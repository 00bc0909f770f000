"""The sieve completes handshakes that an older passt leaves open, and never breaks into a frame."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from random import Random

import pytest

from mica.network import frames, sieve

MACS = (b"\x52\0\0\0\0\1", b"\x52\0\0\0\0\2")


def segment(flags: int, *, source: str = "10.64.0.2", target: str = "10.64.0.1", sequence: int = 0xFFFFFFFF) -> bytes:
    """A TCP segment of the guest, in a frame without its length."""
    tcp = struct.pack("!HHIIBBHHH", 8080, 40000, sequence, 77, 0x50, flags, 65535, 0, 0)
    return frames.ethernet(ip_address(source), ip_address(target), frames.TCP, tcp, macs=MACS)


@pytest.mark.parametrize(("source", "target"), [("10.64.0.2", "10.64.0.1"), ("fd00::2", "fd00::1")])
def test_the_third_segment_of_a_handshake(source: str, target: str) -> None:
    answer = sieve.completed(segment(0x12, source=source, target=target))
    assert struct.unpack("!I", answer[:4])[0] == len(answer) - 4
    # As the tested builder of frames would make it: addresses, ports and MACs turned round, checksums right.
    tcp = struct.pack("!HHIIBBHHH", 40000, 8080, 77, 0, 0x50, 0x10, 1024, 0, 0)
    wanted = frames.ethernet(ip_address(target), ip_address(source), frames.TCP, tcp, macs=MACS[::-1])
    if ":" in source:
        assert answer[4:] == wanted
    else:
        assert answer[4:24] + answer[30:] == wanted[:20] + wanted[26:]  # but for fragment bits and their checksum
        assert frames.checksum(answer[18:38]) == 0


@pytest.mark.parametrize("flags", [0x02, 0x10, 0x18, 0x11, 0x16, 0x04, 0x00])
def test_other_segments_are_not_answered(flags: int) -> None:
    assert sieve.completed(segment(flags)) == b""


def test_other_frames_are_not_answered() -> None:
    whole = segment(0x12)
    for size in range(len(whole)):
        assert sieve.completed(whole[:size]) == b""
    assert sieve.completed(whole[:14] + b"\x46" + whole[15:]) == b""  # with IP options, which no SYN has here
    assert sieve.completed(frames.datagram(ip_address("10.0.0.1"), ip_address("10.0.0.2"), 1, 2, bytes(40))[4:]) == b""
    dice = Random(7)
    for _ in range(2000):
        sieve.completed(dice.randbytes(dice.randrange(120)))


def test_answers_stay_few_and_harm_is_not_answered() -> None:
    sifter = sieve.Sifter()
    one = frames.framed(segment(0x12))
    assert sifter.sift(one * 10_000) == one * 10_000
    assert len(sifter.answers) < 20_000
    sifter = sieve.Sifter()
    assert sifter.sift(frames.framed(segment(0x12, target="127.0.0.1"))) == b""
    assert sifter.answers == b""


def test_a_stream_is_cut_between_frames_only() -> None:
    dice = Random(11)
    stream = b"".join(frames.framed(dice.randbytes(dice.randrange(2000))) for _ in range(200))
    cutter, out, at = sieve.Frames(), b"", 0
    while at < len(stream):
        size = dice.randrange(1, 5000)
        whole, places = cutter.whole(stream[at : at + size])
        at += size
        position = 0
        for start, end in places:
            assert start == position + 4
            assert int.from_bytes(whole[position:start], "big") == end - start
            position = end
        assert position == len(whole)
        out += whole
    assert out == stream
    with pytest.raises(ValueError, match="a frame of"):
        cutter.whole(b"\xff" * 8)
