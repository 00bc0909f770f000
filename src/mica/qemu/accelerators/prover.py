"""What a prover is, and the proofs as they are kept.

A proof holds for one boot and one build: its key names both, so a reboot, another kernel, a reloaded module or
another QEMU is proven again, and everything else is read from a small file.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from mica.model.doctor import AcceleratorProof
from mica.model.errors import Code, MicaError
from mica.qemu.discover import write_atomically


class Prover(Protocol):
    """Proves one accelerator, by its name on QEMU's command line."""

    @property
    def name(self) -> str: ...

    def key(self) -> str:
        """What a proof made now would hold for; empty when none could be kept. Cheap, and never raises."""

    async def prove(self) -> AcceleratorProof:
        """Run a guest on it. A verdict, never an exception: what went wrong is the reason that it does not work."""


class Accelerators:
    """The accelerators of this host, best first, proven when somebody first asks.

    ``cache`` is a directory of ours, made when needed. ``now`` gives Unix time in seconds.
    """

    def __init__(self, provers: Sequence[Prover], *, cache: Path, now: Callable[[], float]) -> None:
        self._provers = tuple(provers)
        self._file = cache / "accelerators.json"
        self._now = now
        self._one_at_a_time = asyncio.Lock()

    async def prove(self, *, fresh: bool = False) -> tuple[AcceleratorProof, ...]:
        """All proofs, best accelerator first; ``fresh`` runs the guests again. Seconds at worst."""
        async with self._one_at_a_time:  # whoever comes second wants the answer, not a second guest
            kept = {} if fresh else self._read()
            proofs = [await self._one(prover, kept.get(prover.name)) for prover in self._provers]
            new = {proof.name: proof for proof in proofs if proof.key}
            if new != kept:
                with contextlib.suppress(OSError):  # without the file the next daemon runs the guests again
                    write_atomically(self._file, msgspec.json.encode(new))
            return tuple(proofs)

    async def best(self) -> AcceleratorProof:
        """The first that works. Raises ``host-lacks`` with every reason where none does."""
        proofs = await self.prove()
        for proof in proofs:
            if proof.works:
                return proof
        reasons = "; ".join(f"{proof.name}: {proof.reason}" for proof in proofs)
        raise MicaError(
            Code.HOST_LACKS,
            f"no accelerator works on this host ({reasons or 'QEMU has none for this system'})",
            hint="install a QEMU with TCG: apt-get install -y qemu-system-x86, then run mica doctor",
        )

    async def _one(self, prover: Prover, kept: AcceleratorProof | None) -> AcceleratorProof:
        key = prover.key()
        if kept is not None and key and kept.key == key:
            return kept
        proof = await prover.prove()
        return msgspec.structs.replace(proof, key=key, proven_at=self._now())

    def _read(self) -> dict[str, AcceleratorProof]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, AcceleratorProof])
        except (OSError, msgspec.MsgspecError):
            return {}  # none yet, or another Mica's: prove again
