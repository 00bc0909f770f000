"""Prove software emulation (TCG): run the canary in QEMU and read what it reports.

The image has a multiboot header, so ``-kernel`` starts it; its reports come out of the ``isa-debugcon`` device and
``isa-debug-exit`` ends QEMU (QEMU docs, "Testing in QEMU" and hw/misc/debugexit.c: status is ``value * 2 + 1``).
"""

from __future__ import annotations

import hashlib
import os

from mica.host.programs import ask
from mica.model.doctor import AcceleratorProof
from mica.model.errors import MicaError
from mica.qemu.accelerators import canary
from mica.qemu.discover import HINT, QemuBuild

_DEADLINE_S = 20.0
_ENDED = 0x10 * 2 + 1


class TcgProver:
    """``accelerator`` other than ``tcg`` lets the same guest be run on another one, which tests use."""

    def __init__(self, build: QemuBuild, *, deadline_s: float = _DEADLINE_S, accelerator: str = "tcg") -> None:
        self._build = build
        self._deadline_s = deadline_s
        self._accelerator = accelerator

    @property
    def name(self) -> str:
        return self._accelerator

    def key(self) -> str:
        return f"{self._build.path} {self._build.identity} {canary_digest()}"

    async def prove(self) -> AcceleratorProof:
        if self._accelerator not in self._build.accelerators:
            return self._proof(
                canary.Verdict(works=False, reason=f"{self._build.path} was built without {self._accelerator}")
            )
        try:
            return self._proof(await self._run())
        except MicaError as error:
            return self._proof(canary.Verdict(works=False, reason=error.message))

    def _proof(self, verdict: canary.Verdict) -> AcceleratorProof:
        return AcceleratorProof(
            name=self.name,
            works=verdict.works,
            reason=verdict.reason,
            fix="" if verdict.works else HINT,
            steps=verdict.steps,
        )

    async def _run(self) -> canary.Verdict:
        listing = canary.load_listing()
        descriptor = os.memfd_create("mica-canary", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, canary.build_image(listing))
            answer = await ask(
                [self._build.path, *self._arguments(descriptor)], timeout_s=self._deadline_s, pass_fds=[descriptor]
            )
        finally:
            os.close(descriptor)
        judge = canary.Judge(None, lambda count: None)
        for value in answer.out:
            judge.byte(value, 0.0)
        if judge.verdict is None and answer.status != _ENDED:  # 1 would be QEMU's own failure
            said = f": {answer.last_words}" if answer.err else ""
            return judge.fail(f"step {judge.current}: QEMU ended with status {answer.status}{said}")
        return judge.end()

    def _arguments(self, image: int) -> list[str]:
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-M", self._build.aliases.get("q35", "q35"), "-accel", self._accelerator, "-cpu", "max", "-m", "32"),
            *("-kernel", f"/proc/self/fd/{image}", "-chardev", "stdio,id=report"),
            *("-device", f"isa-debugcon,iobase={canary.REPORT_PORT:#x},chardev=report"),
            *("-device", f"isa-debug-exit,iobase={canary.END_PORT:#x},iosize=1"),
        ]


def canary_digest() -> str:
    """Changes when the canary does, so that an old proof is not taken for a new one."""
    return hashlib.sha256(bytes(canary.build_image(canary.load_listing()))).hexdigest()[:12]
