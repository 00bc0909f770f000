"""QEMU, its accelerators, and its system call filter."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from mica.host.doctor_base import Patient
from mica.host.processes import CLEAN_ENVIRONMENT
from mica.model.doctor import AcceleratorProof, Finding, Status
from mica.model.errors import MicaError

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_EMULATED = "software emulation (TCG)"
_NAMES = {"kvm": "Accelerator KVM", "tcg": "Accelerator TCG"}
_START_TIMEOUT_S = 20.0


async def qemu(patient: Patient) -> Sequence[Finding]:
    build = patient.qemu
    if isinstance(build, MicaError):
        return [
            Finding(
                id="qemu",
                title="QEMU",
                status=Status.MISSING,
                proof=build.message,
                costs="no virtual machine can run",
                fix=patient.fixes.install(["qemu-system-x86_64"]),
                fix_note="" if patient.fixes.family else build.hint,
            )
        ]
    boards = ", ".join(f"{alias} is {name}" for alias, name in sorted(build.aliases.items()))
    proof = f"{build.path} answered: version {build.version}, {len(build.machines)} machine types ({boards})"
    return [Finding(id="qemu", title="QEMU", status=Status.OK, proof=proof)]


async def accelerators(patient: Patient) -> Sequence[Finding]:
    working = [proof.name for proof in patient.proofs if proof.works]
    out = []
    for proof in patient.proofs:
        status = Status.OK if proof.works else (Status.DEGRADED if working else Status.MISSING)
        out.append(
            Finding(
                id=f"accelerator-{proof.name}",
                title=_NAMES.get(proof.name, f"Accelerator {proof.name}"),
                status=status,
                proof=proof.reason
                if proof.works
                else f"a small 64-bit guest was run, and it failed: {proof.reason}"
                if proof.steps
                else proof.reason,
                costs="" if proof.works else _costs(proof, working),
                fix=_fix(patient, proof),
                fix_note=_note(patient, proof),
            )
        )
    return out


def _costs(proof: AcceleratorProof, working: Sequence[str]) -> str:
    if not working:
        return "no virtual machine can run"
    if working[0] == "tcg":
        return f"guests run in {_EMULATED}: each instruction is translated, many times slower than on the processor"
    return f"nothing while {working[0]} works"


def _fix(patient: Patient, proof: AcceleratorProof) -> tuple[str, ...]:
    """The prover's command as an argument vector; one that needs a shell gets one."""
    if proof.works or not proof.fix:
        return ()
    if proof.name == "tcg":
        return patient.fixes.install(["qemu-system-x86_64"])
    if "&&" not in proof.fix:
        return tuple(proof.fix.split())
    return patient.fixes.command("sh", "-c", proof.fix.replace("sudo ", ""))


def _note(patient: Patient, proof: AcceleratorProof) -> str:
    if proof.works:
        return ""
    if "usermod" in proof.fix:
        return "then log in again, and start the daemon again"
    if proof.name == "kvm" and not proof.fix and proof.steps:
        return "no command closes this: the kernel's KVM does not run guests on this machine"
    if proof.name == "kvm" and not proof.fix:
        return "switch on virtualization in the firmware, or nested virtualization where this machine is a guest"
    return ""


async def sandbox(patient: Patient) -> Sequence[Finding]:
    build = patient.qemu
    if isinstance(build, MicaError):
        return []
    title = "System call filter"
    if not build.has_sandbox:
        return [
            Finding(
                id="sandbox",
                title=title,
                status=Status.DEGRADED,
                proof=f"{build.path} has no -sandbox option: it was built without seccomp",
                costs="a guest that breaks out of QEMU may use every system call of the host's kernel",
                fix=patient.fixes.install(["qemu-system-x86_64"]),
            )
        ]
    mode, words = await _seccomp_mode(build.path)
    said = f": {words}" if words else ""
    if mode == "2":
        proof = f"QEMU started with -sandbox {SANDBOX}; the kernel says Seccomp: 2 (filter)"
        return [Finding(id="sandbox", title=title, status=Status.OK, proof=proof)]
    return [
        Finding(
            id="sandbox",
            title=title,
            status=Status.DEGRADED,
            proof=f"QEMU started with -sandbox {SANDBOX} has Seccomp: {mode or 'nothing'}{said}",
            costs="a guest that breaks out of QEMU may use every system call of the host's kernel",
            fix_note="allow seccomp filters here: a container's own filter may forbid them",
        )
    ]


async def _seccomp_mode(path: str) -> tuple[str, str]:
    """The field ``Seccomp`` of a running QEMU (proc(5): 2 is a filter), and what it said if it did not start."""
    arguments = ("-M", "none", "-nodefaults", "-no-user-config", "-S", "-display", "none", "-qmp", "stdio")
    process = await asyncio.create_subprocess_exec(
        *(path, *arguments, "-sandbox", SANDBOX),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(CLEAN_ENVIRONMENT),
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            # The greeting comes after the filter is installed: options are taken before monitors speak.
            greeting = (await process.stdout.readline()).decode(errors="replace").strip()
        if '"QMP"' not in greeting:
            return "", greeting[:300]
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Seccomp:"):
                return line.split()[1], ""
        return "", "the kernel does not tell"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
