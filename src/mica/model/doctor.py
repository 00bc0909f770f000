"""What a host can do and how that is known: facts that were read, accelerators that were proven, findings with proof.

Nothing here is a guess from a name: a finding's ``proof`` says what was done and what came of it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mica.model.units import Bytes


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What this process may use of its host. Sizes in bytes.

    ``memory_total`` and ``memory_available`` already respect the memory limits of the control groups above us
    (``memory_limit`` is the tightest of them, ``None`` where there is none); ``memory_host`` is what the machine has.
    ``cpus`` counts the processors we may be scheduled on, ``cpu_quota`` is the tightest quota above us in processors
    (1.5 is one and a half). ``shm_total`` is 0 where ``/dev/shm`` is not a tmpfs.
    """

    hostname: str
    kernel: str
    architecture: str
    boot_id: str
    memory_host: Bytes
    memory_total: Bytes
    memory_available: Bytes
    memory_limit: Bytes | None = None
    swap_total: Bytes = Bytes(0)
    swap_free: Bytes = Bytes(0)
    cpus: int = 1
    cpu_quota: float | None = None
    shm_total: Bytes = Bytes(0)
    shm_free: Bytes = Bytes(0)

    @property
    def processors(self) -> float:
        """Processors that we can really keep busy: affinity and quota together."""
        return float(self.cpus) if self.cpu_quota is None else min(float(self.cpus), self.cpu_quota)


class AcceleratorStep(msgspec.Struct, frozen=True):
    """One thing that an accelerator was made to do; ``text`` says what was expected and what came."""

    name: str
    ok: bool
    text: str = ""


class AcceleratorProof(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an accelerator works, from having run a guest on it.

    ``reason`` is one sentence for people: what failed, with the exit reason, or what was measured. ``fix`` is the
    command that would change the verdict, where there is one. ``loop_ratio`` is the time of a loop in the guest
    divided by the time of the same machine code on the host. ``proven_at`` is Unix time in seconds; ``key`` names
    the boot and the build that the proof holds for.
    """

    name: str
    works: bool
    reason: str
    fix: str = ""
    loop_ratio: float | None = None
    steps: tuple[AcceleratorStep, ...] = ()
    proven_at: float = 0.0
    key: str = ""


class Status(StrEnum):
    """``degraded``: Mica works, with less; ``missing``: something that Mica needs is not there."""

    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``mica doctor``.

    ``proof`` says what was done and what came of it; ``costs`` what the gap costs (empty when there is none); ``fix``
    is the argument vector of the one command that closes the gap (empty when no command does), and ``fix_note`` what
    to know about it: a new login, a reboot, a risk.
    """

    id: str
    title: str
    status: Status
    proof: str
    costs: str = ""
    fix: tuple[str, ...] = ()
    fix_note: str = ""


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """All findings, in the order in which they are told, and the facts they were judged by."""

    findings: tuple[Finding, ...]
    host: HostFacts
    accelerators: tuple[AcceleratorProof, ...] = ()

    @property
    def status(self) -> Status:
        """The worst of the findings."""
        order = (Status.OK, Status.DEGRADED, Status.MISSING)
        return max((finding.status for finding in self.findings), key=order.index, default=Status.OK)
