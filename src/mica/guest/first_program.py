"""The first program that a copied machine runs: a few hundred bytes that any x86-64 Linux executes at once.

A fork has its parent's random generator, clock and MAC addresses, and a shell would need a process for each of them;
most guests have none at all that reseeds the generator: writing to ``/dev/urandom`` mixes the bytes in, but takes
effect up to minutes later. ``RNDADDENTROPY`` and then ``RNDRESEEDCRNG`` take effect at once (random(4)). The program
is one static ELF file (elf(5)) of one segment; its machine code is in ``first_program.lst``.

It removes the file that it was started from, adds entropy, reseeds, sets the clock, and sets the MAC address of each
interface that its arguments name.

    standard input:   struct rand_pool_info with 64 bytes (72) | struct timespec (16) | MAC addresses, 8 bytes each
    standard output:  "M", then one byte each for the generator, the clock, and every argument: 0 or an errno
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

SEED_SIZE = 64
MARK = b"M"

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


def standard_input(seed: bytes, unix_time_s: float, macs: list[str]) -> bytes:
    """What it reads: ``seed`` of 64 bytes, the time, and a MAC address for each argument."""
    if len(seed) != SEED_SIZE:
        raise ValueError(f"a seed has {SEED_SIZE} bytes")
    seconds = int(unix_time_s)
    fraction = int((unix_time_s - seconds) * 1e9)
    entropy = struct.pack("<II", SEED_SIZE * 8, SEED_SIZE) + seed
    addresses = b"".join(bytes.fromhex(mac.replace(":", "")) + bytes(2) for mac in macs)
    return entropy + struct.pack("<qq", seconds, fraction) + addresses


def results(answer: bytes, arguments: int) -> list[int] | None:
    """What it answered: an errno or 0 for the generator, the clock, and each argument; ``None``: it did not run."""
    if len(answer) != len(MARK) + 2 + arguments or not answer.startswith(MARK):
        return None
    return list(answer[len(MARK) :])
