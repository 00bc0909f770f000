"""The canary: a 64-bit guest of a page of machine code, and the judge of what it reports.

The guest does what an ordinary kernel does in its first second: 64-bit arithmetic, CPUID, ``cmpxchg16b``,
``fxsave64``, ``xsave``, page-table switches, a page fault, a model-specific register, and a loop that is timed
against the same machine code on the host. It is the same image on every accelerator. Instructions and registers: Intel
SDM volumes 2 and 3A; the multiboot header: Multiboot Specification 0.6.96, section 3.1.

    memory, from BASE:  header, code │ data │ stack │ tables A, B (4 pages each) │ pages X and Y
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from mica.model.doctor import AcceleratorStep

BASE = 0x10_0000
CODE = BASE + 0x40
DATA = BASE + 0x2000
PAIR = DATA + 0x10
LOOPS = DATA + 0x20
CELL = DATA + 0x40
GDTR = DATA + 0xF0
IDTR = DATA + 0x100
FXAREA = DATA + 0x200
XAREA = DATA + 0x400
GDT = DATA + 0x800
IDT = DATA + 0x900
STACK = BASE + 0x6000
TABLE_A = BASE + 0x6000
TABLE_B = BASE + 0x9000
WINDOW_PTE = BASE + 0xC000
PAGE_X = BASE + 0xE000
PAGE_Y = BASE + 0xF000
IMAGE_SIZE = 0x10000
WINDOW = 0x60_0000
HOLE = 0x60_1000

REPORT_PORT = 0xE9
END_PORT = 0xF4

CODE_SELECTOR = 0x08
DATA_SELECTOR = 0x10
GDT_LIMIT = 3 * 8 - 1
IDT_LIMIT = 15 * 16 - 1

_PAIR = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
_X, _Y, _Y_NEXT = 0xAAAA0000AAAA0001, 0xBBBB0000BBBB0002, 0xBBBB0000BBBB0003
_PRESENT_WRITABLE = 3
_LARGE = 0x80

SHORT_LOOPS = 200_000
LONG_LOOPS = 10_000_000
MAX_RATIO = 3.0
"""A loop in a guest on hardware takes the time it takes on the host; software emulation takes ten times as long."""
_GOOD_RATIO = 1.25
_MAX_ROUNDS = 12
_NOMINAL_TURN_S = 4e-9

_CX16, _XSAVE, _FXSR = 1 << 13, 1 << 26, 1 << (24 + 32)


class Listing(msgspec.Struct, frozen=True):
    """The machine code, and where its labels are (bytes from its start)."""

    code: bytes
    labels: dict[str, int]

    def address(self, label: str) -> int:
        return CODE + self.labels[label]

    def label_at(self, address: int) -> str:
        """The label that ``address`` lies behind, for people."""
        below = [(offset, name) for name, offset in self.labels.items() if CODE + offset <= address]
        return max(below)[1] if below and address < CODE + len(self.code) else ""


def parse_listing(text: str) -> Listing:
    code, labels = bytearray(), {}
    for raw in text.splitlines():
        line = raw.strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif "|" in line:
            code += bytes.fromhex(line.partition("|")[0])
    return Listing(bytes(code), labels)


def load_listing() -> Listing:
    return parse_listing((Path(__file__).parent / "canary.lst").read_text(encoding="ascii"))


def build_image(listing: Listing) -> bytearray:
    """Guest memory from ``BASE`` on, ready to run: multiboot header, code, tables, descriptors, data."""
    image = bytearray(IMAGE_SIZE)

    def put(address: int, data: bytes) -> None:
        image[address - BASE : address - BASE + len(data)] = data

    magic, flags = 0x1BADB002, 0x10000  # the address fields below are valid
    entry = listing.address("multiboot_entry")
    load_end = BASE + IMAGE_SIZE
    put(BASE, struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, BASE, BASE, load_end, load_end, entry))
    put(CODE, listing.code)
    put(PAIR, struct.pack("<2Q", *_PAIR))
    put(LOOPS, struct.pack("<Q", SHORT_LOOPS))
    # Flat descriptors: none, 64-bit code, data.
    put(GDT, struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF))
    handler = listing.address("page_fault")
    gate = struct.pack("<HHHHII", handler & 0xFFFF, CODE_SELECTOR, 0x8E00, handler >> 16 & 0xFFFF, handler >> 32, 0)
    put(IDT + 14 * 16, gate)
    put(GDTR, struct.pack("<HQ", GDT_LIMIT, GDT))
    put(IDTR, struct.pack("<HQ", IDT_LIMIT, IDT))
    for top, window_table, page in ((TABLE_A, WINDOW_PTE, PAGE_X), (TABLE_B, WINDOW_PTE + 0x1000, PAGE_Y)):
        put(top, struct.pack("<Q", top + 0x1000 | _PRESENT_WRITABLE))
        put(top + 0x1000, struct.pack("<Q", top + 0x2000 | _PRESENT_WRITABLE))
        put(top + 0x2000, struct.pack("<Q", _PRESENT_WRITABLE | _LARGE))  # the first 2 MiB as they are
        put(top + 0x2000 + 3 * 8, struct.pack("<Q", window_table | _PRESENT_WRITABLE))
        put(window_table, struct.pack("<Q", page | _PRESENT_WRITABLE))
    put(PAGE_X, struct.pack("<Q", _X))
    put(PAGE_Y, struct.pack("<2Q", _Y, _Y_NEXT))
    return image


def loop_result(count: int) -> int:
    return count * (count + 1) // 2 & 0xFFFFFFFFFFFFFFFF


class _Expected(msgspec.Struct, frozen=True):
    step: int
    name: str
    what: str
    right: Callable[[int], bool]
    absent: int | None = None  # the value that says that the guest was not offered it


def _expect(step: int, name: str, *values: tuple[str, int]) -> Iterator[_Expected]:
    for what, value in values:
        yield _Expected(step, name, what, lambda seen, value=value: seen == value)  # type: ignore[misc]


_WRITTEN = 0x7777777788888888
SCRIPT: tuple[_Expected, ...] = (
    *_expect(1, "64-bit arithmetic", ("the product", 0x0123456789ABCDEF * 0x1000000000000003 & (1 << 64) - 1)),
    _Expected(2, "CPUID", "cmpxchg16b and fxsave are offered", lambda seen: seen & (_CX16 | _FXSR) == _CX16 | _FXSR),
    *_expect(
        3,
        "cmpxchg16b",
        ("the zero flag of an equal comparison", 1),
        ("the low half in memory", 0x1122334455667788),
        ("the high half in memory", 0x99AABBCCDDEEFF00),
        ("rax after an unequal comparison", 0x1122334455667788),
        ("rdx after an unequal comparison", 0x99AABBCCDDEEFF00),
    ),
    *_expect(4, "fxsave64", ("xmm0 in memory", 0xFEEDFACECAFEBEEF), ("xmm0 restored", 0xFEEDFACECAFEBEEF)),
    _Expected(5, "xsave", "xmm0 restored", lambda seen: seen == 0x5CA1AB1E0DDBA115, absent=0),
    *_expect(
        6,
        "page-table switch",
        ("the window under the first tables", _X),
        ("the window under the second tables", _Y),
        ("the window back under the first tables", _X),
        ("what was written through the second tables", _WRITTEN),
        ("the window after its entry was changed", _Y_NEXT),
    ),
    *_expect(7, "page fault", ("the faulting address and its error code", HOLE << 8)),
    *_expect(8, "model-specific register", ("what was written to KERNEL_GS_BASE", 0x0000123413572468)),
)
LOOP_NAME = "timed loop"
_LOOP_ASKS, _LOOP_DONE = 9, 10


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run, before anybody gives it a time and a key."""

    works: bool
    reason: str
    loop_ratio: float | None = None
    steps: tuple[AcceleratorStep, ...] = ()


class Judge:
    """Takes the guest's reports one byte at a time and says whether they are right.

        script ──every value right──► loops ──ratio known──► verdict
          └────────a wrong one────────────────────────────────► verdict

    ``host_loop`` gives the seconds that the loop takes on the host for a number of turns (``None``: nothing is
    compared; an emulator's speed is what it is). ``set_loops`` tells the guest how many turns come next, 0 to end.
    """

    def __init__(self, host_loop: Callable[[int], float] | None, set_loops: Callable[[int], None]) -> None:
        self._host_loop = host_loop
        self._set_loops = set_loops
        self._record = bytearray()
        self._position = 0
        self._steps: list[AcceleratorStep] = []
        self._count = SHORT_LOOPS
        self._loop_s = 0.0
        self._rounds = 0
        self._best: float | None = None
        self._asked = False
        self.verdict: Verdict | None = None

    @property
    def current(self) -> str:
        """The step that the guest is in."""
        return SCRIPT[self._position].name if self._position < len(SCRIPT) else LOOP_NAME

    @property
    def steps(self) -> tuple[AcceleratorStep, ...]:
        return tuple(self._steps)

    def byte(self, value: int, elapsed_s: float) -> None:
        """The guest wrote ``value`` after having run for ``elapsed_s`` seconds."""
        if not self._record:
            self._loop_s = elapsed_s
        self._record.append(value)
        if len(self._record) == 9 and self.verdict is None:
            step, number = self._record[0], int.from_bytes(self._record[1:], "little")
            self._record.clear()
            self._take(step, number)

    def end(self) -> Verdict:
        """The guest ended by itself."""
        if self.verdict is None:
            if self._position == len(SCRIPT) and self._rounds:
                self._conclude()
            else:
                self.fail(f"the guest ended in the middle of step {self.current}")
        assert self.verdict is not None
        return self.verdict

    def fail(self, what: str) -> Verdict:
        """Something other than a report came; ``what`` says it with the step it came in."""
        self._steps.append(AcceleratorStep(self.current, ok=False, text=what))
        self.verdict = Verdict(works=False, reason=what, loop_ratio=self._best, steps=self.steps)
        return self.verdict

    def _take(self, step: int, value: int) -> None:
        if self._position < len(SCRIPT):
            expected = SCRIPT[self._position]
            if step != expected.step:
                self.fail(f"step {expected.name}: the guest reported step {step} instead")
            elif value != expected.absent and not expected.right(value):
                self.fail(f"step {expected.name}: {expected.what} was {value:#x}, which is wrong")
            else:
                self._position += 1
                last = self._position == len(SCRIPT) or SCRIPT[self._position].step != step
                if last:
                    text = "not offered to the guest" if value == expected.absent else f"{expected.what}: {value:#x}"
                    self._steps.append(AcceleratorStep(expected.name, ok=True, text=text))
        elif step == _LOOP_ASKS:
            self._asked = True
        elif step == _LOOP_DONE and self._asked:
            self._asked = False
            self._loop_done(value)
        else:
            self.fail(f"step {LOOP_NAME}: the guest reported step {step}")

    def _loop_done(self, value: int) -> None:
        if value != loop_result(self._count):
            self.fail(f"step {LOOP_NAME}: {self._count} turns gave {value}, not {loop_result(self._count)}")
            return
        self._rounds += 1
        if self._host_loop is None:
            self._set_loops(0)
            return
        ratio = self._loop_s / self._host_loop(self._count)
        if self._count == SHORT_LOOPS and ratio < 50 * MAX_RATIO:
            self._again(LONG_LOOPS)  # the short one was only to find out whether a long one can be waited for
            return
        self._best = ratio if self._best is None else min(self._best, ratio)
        # Other work on this host can make a round slow but never fast, so the best round tells.
        hopeless = self._count == SHORT_LOOPS or self._best > 10 * MAX_RATIO
        if self._best <= _GOOD_RATIO or self._rounds > _MAX_ROUNDS or hopeless:
            self._conclude()
            self._set_loops(0)
        else:
            self._again(LONG_LOOPS)

    def _again(self, count: int) -> None:
        self._count = count
        self._set_loops(count)

    def _conclude(self) -> None:
        if self._best is not None and self._best > MAX_RATIO:
            self.fail(
                f"a loop takes {self._best:.1f} times as long in the guest as on the host "
                f"(more than {MAX_RATIO:g}): this is not hardware speed"
            )
            return
        compared = "gave the right result" if self._best is None else f"took {self._best:.2f} times the host's time"
        self._steps.append(AcceleratorStep(LOOP_NAME, ok=True, text=compared))
        self.verdict = Verdict(
            works=True,
            reason=f"a 64-bit guest gave the right answer in all {len(self._steps)} steps; its loop {compared}",
            loop_ratio=self._best,
            steps=self.steps,
        )


def make_host_loop(listing: Listing) -> Callable[[int], float]:
    """The guest's loop as a function of this process: the seconds that ``count`` turns take.

    Where the host lets nobody execute what he wrote (SELinux ``execmem``, for example), it is what they would take on
    a slow processor. The mapping stays as long as the process: it is a page, and the process is short-lived.
    """
    start, end = listing.labels["timed_loop"], listing.labels["end"]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    descriptor = os.memfd_create("mica-canary", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, listing.code[start:end])
        address = libc.mmap(None, end - start, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        return lambda count: count * _NOMINAL_TURN_S
    # Arguments as in the System V ABI for x86-64: rdi and rsi, which is where the guest puts them too.
    kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)
    cell = ctypes.c_uint64(0)
    function = kind(address)

    def run(count: int) -> float:
        begun = time.perf_counter()
        result = function(count, ctypes.addressof(cell))
        elapsed = time.perf_counter() - begun
        if result != loop_result(count):
            raise ArithmeticError(f"the host's own loop gave {result} for {count} turns")
        return max(elapsed, 1e-9)

    return run
