"""``mica doctor``: what this host can do, each line with a proof by doing.

Every check does the thing: starts QEMU under its seccomp filter, makes a namespace, creates a control group, writes
to the disk. What it did and what came of it is the finding's proof; for a gap the finding says what it costs and the
one command that closes it. Checks are independent, run side by side, have a deadline each, and leave nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mica.host import doctor_images, doctor_jail, doctor_network, doctor_qemu, doctor_resources, doctor_session
from mica.host.doctor_base import Check, Examination, Patient, Probes, QemuView
from mica.host.doctor_cgroups import cgroups
from mica.host.doctor_fix import Fixes, read_family
from mica.host.facts import read_facts
from mica.model.doctor import AcceleratorProof, DoctorReport, Finding, Status
from mica.model.errors import Code, MicaError

__all__ = ["CHECKS", "Examination", "Probes", "examine"]

CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("qemu", "QEMU", doctor_qemu.qemu),
    ("accelerators", "Accelerators", doctor_qemu.accelerators),
    ("privileges", "Privileges", doctor_jail.privileges),
    ("jail", "Jail", doctor_jail.jail),
    ("sandbox", "System call filter", doctor_qemu.sandbox),
    ("boundary", "Boundary", doctor_jail.boundary),
    ("network", "User-mode network", doctor_network.user_mode),
    ("tun", "Taps", doctor_network.taps),
    ("cgroups", "Control groups", cgroups),
    ("memory", "Memory", doctor_resources.memory),
    ("guest-ram", "Guest memory", doctor_resources.guest_ram),
    ("cpus", "Processors", doctor_resources.processors),
    ("disk", "Disk", doctor_resources.disk),
    ("qemu-img", "Disk images", doctor_images.disk_images),
    ("uefi", "UEFI firmware", doctor_images.firmware),
    ("images", "Image building", doctor_images.building),
    ("ptrace", "Memory of processes", doctor_session.process_memory),
    ("linger", "Logout", doctor_session.lingering),
)
"""In the order in which the findings are told."""


async def examine(examination: Examination) -> DoctorReport:
    """Examine this host; a second or two, seconds more when accelerators are proven again.

    Raises ``host-lacks`` only where ``/proc`` cannot be read: everything else that goes wrong is a finding.
    """
    facts = read_facts(examination.root)
    qemu, proofs = await _ask(examination)
    fixes = Fixes(read_family(examination.root), examination.uid == 0)
    patient = Patient(examination=examination, facts=facts, fixes=fixes, qemu=qemu, proofs=proofs)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_run(key, title, check, patient)) for key, title, check in CHECKS]
    findings = tuple(finding for task in tasks for finding in task.result())
    return DoctorReport(findings=findings, host=facts, accelerators=proofs)


async def _ask(examination: Examination) -> tuple[QemuView | MicaError, tuple[AcceleratorProof, ...]]:
    try:
        build = await examination.probes.qemu()
        return build, tuple(await examination.probes.accelerators(examination.fresh))
    except MicaError as error:
        return error, ()


async def _run(key: str, title: str, check: Check, patient: Patient) -> Sequence[Finding]:
    """A check that fails or hangs is a finding itself: the others are still told."""
    limit = patient.examination.check_timeout_s
    try:
        async with asyncio.timeout(limit):
            return await check(patient)
    except TimeoutError:
        words = f"did not come back within {limit:g} s"
    except MicaError as error:
        words = str(error) if error.code is not Code.TIMEOUT else error.message
    except OSError as error:
        words = f"{error.filename or 'a system call'}: {error.strerror or error}"
    return [
        Finding(
            id=key,
            title=title,
            status=Status.DEGRADED,
            proof=f"could not be examined: {words}",
            costs="what Mica does there may fail",
        )
    ]
