"""Where a user's session and the kernel's tracing rules touch VMs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from mica.host.doctor_base import Patient
from mica.host.programs import ask
from mica.model.doctor import Finding, Status

_TIMEOUT_S = 10.0


async def process_memory(patient: Patient) -> Sequence[Finding]:
    """Whether a child's memory can be read from outside, by reading some."""
    scope = patient.setting("kernel.yama.ptrace_scope") or "not restricted by this kernel"
    failure = await _read_child()
    title = "Memory of processes"
    if not failure and (patient.is_root or scope not in ("2", "3")):
        proof = f"the memory of a child was read through /proc/PID/mem (ptrace scope: {scope})"
        return [Finding(id="ptrace", title=title, status=Status.OK, proof=proof)]
    return [
        Finding(
            id="ptrace",
            title=title,
            status=Status.DEGRADED,
            proof=f"/proc/PID/mem of a child: {failure or 'readable'} (ptrace scope: {scope})",
            costs="snapshots with memory of a fork go through QEMU itself, which takes longer",
            fix=patient.fixes.sysctl("kernel.yama.ptrace_scope", 1) if scope == "2" else (),
            fix_note="" if scope == "2" else "scope 3 stays until the next boot",
        )
    ]


async def _read_child() -> str:
    process = await asyncio.create_subprocess_exec(
        "/bin/cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        return _read_memory(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def _read_memory(pid: int) -> str:
    try:
        start = int(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").partition("-")[0], 16)
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return "" if os.pread(descriptor, 4096, start) else "nothing could be read"
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)


async def lingering(patient: Patient) -> Sequence[Finding]:
    """Whether a daemon of this user outlives a logout."""
    title = "Logout"
    user = patient.examination.user
    if not (patient.root / "run/systemd/system").is_dir():
        proof = "there is no systemd here, so a logout ends no process of its own accord"
        return [Finding(id="linger", title=title, status=Status.OK, proof=proof)]
    if patient.is_root:
        proof = "running as root: a logout does not end system services"
        return [Finding(id="linger", title=title, status=Status.OK, proof=proof)]
    loginctl = patient.program("loginctl")
    words = ""
    if loginctl is not None:
        answer = await ask([loginctl, "show-user", user, "--property=Linger", "--value"], timeout_s=_TIMEOUT_S)
        words = answer.text.strip()
        if answer.status == 0 and words == "yes":
            proof = f"loginctl says that {user} lingers"
            return [Finding(id="linger", title=title, status=Status.OK, proof=proof)]
    return [
        Finding(
            id="linger",
            title=title,
            status=Status.DEGRADED,
            proof=f"loginctl says that {user} does not linger ({words or 'no answer'})",
            costs="systemd may end the daemon and its VMs when the last session of this user ends",
            fix=patient.fixes.command("loginctl", "enable-linger", user),
        )
    ]
