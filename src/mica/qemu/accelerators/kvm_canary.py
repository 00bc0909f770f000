"""Run the canary on KVM, in a process of its own: ``python -m mica.qemu.accelerators.kvm_canary
[DEVICE]``.

A KVM that lies may never come back from an ``ioctl``, so this process exists to be killed. It writes one JSON object
per line: ``{"step": …}`` when a step begins, and at the end the verdict.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from mica.qemu.accelerators import canary
from mica.qemu.accelerators.kvm_api import DEVICE, Halt, KvmApi, KvmGuest, LinuxKvm

API_VERSION = 12
"""The only one since Linux 2.6.22; api.rst says to refuse any other."""
_MAX_EXITS = 5000


class StepBegun(msgspec.Struct, frozen=True, tag_field="kind", tag="step"):
    step: str


class VerdictLine(msgspec.Struct, frozen=True, tag_field="kind", tag="verdict"):
    verdict: canary.Verdict


Line = StepBegun | VerdictLine


def run_canary(
    api: KvmApi,
    *,
    begun: Callable[[str], None] = lambda step: None,
    clock: Callable[[], float] = time.perf_counter,
    host_loop: Callable[[int], float] | None = None,
) -> canary.Verdict:
    """Run the canary on ``api`` and judge it. ``begun`` is told each step as it begins.

    Never raises ``OSError``: a system call that fails is a verdict.
    """
    step = "KVM_GET_API_VERSION"
    begun(step)
    try:
        version = api.api_version()
        if version != API_VERSION:
            return _failed(f"KVM answers with API version {version}, not {API_VERSION}")
        step = "creation of a virtual machine"
        begun(step)
        listing = canary.load_listing()
        guest = api.create(listing, canary.build_image(listing))
    except OSError as error:
        return _failed(f"{step} failed: {error.strerror or error}")
    try:
        return _drive(guest, listing, begun, clock, host_loop or canary.make_host_loop(listing))
    finally:
        guest.close()


def _failed(reason: str) -> canary.Verdict:
    return canary.Verdict(works=False, reason=reason)


def _drive(
    guest: KvmGuest,
    listing: canary.Listing,
    begun: Callable[[str], None],
    clock: Callable[[], float],
    host_loop: Callable[[int], float],
) -> canary.Verdict:
    def set_loops(count: int) -> None:
        guest.write(canary.LOOPS, struct.pack("<Q", count))

    judge = canary.Judge(host_loop, set_loops)
    told = ""
    for _ in range(_MAX_EXITS):
        if judge.current != told:
            told = judge.current
            begun(told)
        start = clock()
        try:
            stop = guest.run()
        except OSError as error:
            return judge.fail(f"step {judge.current}: KVM_RUN failed: {error.strerror or error}")
        elapsed = clock() - start
        if isinstance(stop, Halt):
            return judge.fail(f"step {judge.current}: {stop.text}")
        if stop.port == canary.END_PORT:
            return judge.end()
        if stop.port != canary.REPORT_PORT or len(stop.data) != 1:
            return judge.fail(f"step {judge.current}: the guest wrote {len(stop.data)} bytes to port {stop.port:#x}")
        judge.byte(stop.data[0], elapsed)
        if judge.verdict is not None:
            return judge.verdict
    return judge.fail(f"step {judge.current}: the guest did not end after {_MAX_EXITS} exits")


def main(out: BinaryIO, device: str) -> None:
    def say(line: Line) -> None:
        out.write(msgspec.json.encode(line) + b"\n")
        out.flush()

    try:
        api = LinuxKvm(device)
    except OSError as error:
        say(VerdictLine(_failed(f"{device} cannot be opened: {error.strerror}")))
        return
    with api:
        say(VerdictLine(run_canary(api, begun=lambda step: say(StepBegun(step)))))


if __name__ == "__main__":
    main(sys.stdout.buffer, sys.argv[1] if len(sys.argv) > 1 else DEVICE)
