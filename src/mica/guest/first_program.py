"""The first program that a copied machine runs: a few hundred bytes that any x86-64 Linux executes at once.

A copy has its original's random generator, clock and MAC addresses. A shell would need a process for each, and most
guests have no program that reseeds the generator: writing to ``/dev/urandom`` mixes bytes in, which takes effect up to
minutes later; ``RNDADDENTROPY`` and then ``RNDRESEEDCRNG`` take effect at once (random(4)). The program is one static
ELF file (elf(5)) of one segment; its machine code is in ``first_program.lst``.

It removes the file that it was started from, then reads an order: adds entropy, reseeds, sets the clock, and gives
every virtio NIC that has an old MAC address, or the new one already, the new one. Without arguments it ends then. With
one argument it waits for the next order: so it waits in a machine that may be copied, and a copy need not start any
program, which is what takes longest there.

    order:   "idty" | mark (4) | struct rand_pool_info with 64 bytes (72) | struct timespec (16)
             | 32 times a MAC address and its new one (8 each)
    answer:  the order's mark (4) | one byte each for the generator, the clock and the 32 NICs: 0, an errno, or 255
             for not found
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mica.model.identity import MAX_NICS

SEED_SIZE = 64
NOT_FOUND = 255
MARK_SIZE = 4
ANSWER_SIZE = MARK_SIZE + 2 + MAX_NICS

_LOAD_ADDRESS = 0x40_0000
_HEADERS = 64 + 56
_READ_EXECUTE = 5


@lru_cache(maxsize=1)
def code() -> bytes:
    """The machine code, from its listing."""
    listing = (Path(__file__).parent / "first_program.lst").read_text(encoding="ascii")
    lines = [line.partition("|") for line in listing.splitlines() if not line.startswith("#")]
    return bytes.fromhex("".join(left for left, bar, _ in lines if bar))


@lru_cache(maxsize=1)
def program() -> bytes:
    """The executable file."""
    body = code()
    size = _HEADERS + len(body)
    identification = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _LOAD_ADDRESS + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, _READ_EXECUTE, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 0x1000)
    return identification + header + segment + body


@lru_cache(maxsize=1)
def octal() -> str:
    """The executable file as the format of printf(1): what a shell can write by itself."""
    return "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\{byte:03o}" for byte in program())


def order(mark: bytes, seed: bytes, unix_time_s: float, macs: Mapping[str, str]) -> bytes:
    """What it reads: a mark of 4 bytes, a seed of 64, the time, and MAC addresses, old → new."""
    if len(seed) != SEED_SIZE or len(mark) != MARK_SIZE:
        raise ValueError(f"a seed has {SEED_SIZE} bytes, a mark {MARK_SIZE}")
    seconds = int(unix_time_s)
    entropy = struct.pack("<II", SEED_SIZE * 8, SEED_SIZE) + seed
    time = struct.pack("<qq", seconds, int((unix_time_s - seconds) * 1e9))
    addresses = b"".join(bytes.fromhex(mac.replace(":", "")) + bytes(2) for pair in macs.items() for mac in pair)
    return b"idty" + mark + entropy + time + addresses.ljust(MAX_NICS * 16, b"\0")


def results(answers: bytes, mark: bytes, nics: int) -> list[int] | None:
    """What it answered to the order with that mark, for the generator, the clock and each NIC; ``None``: nothing."""
    for start in range(0, len(answers) - ANSWER_SIZE + 1, ANSWER_SIZE):
        answer = answers[start : start + ANSWER_SIZE]
        if answer.startswith(mark):
            return list(answer[MARK_SIZE : MARK_SIZE + 2 + nics])
    return None
