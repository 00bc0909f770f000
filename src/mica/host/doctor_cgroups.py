"""Control groups: which kind this host has and whether we may use it, by making a group and removing it.

Sources: the kernel's ``admin-guide/cgroup-v2.rst`` ("Delegation"), cgroups(7), systemd.resource-control(5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mica.host.doctor_base import Patient
from mica.host.facts import Group, own_groups
from mica.host.programs import ask
from mica.host.slices import HostSlices, NoSlices
from mica.model.doctor import Finding, Status
from mica.model.errors import MicaError
from mica.model.units import MIB, Bytes
from mica.ports.slices import SliceLimits

_CONTROLLERS = ("cpu", "memory")
_TIMEOUT_S = 15.0
_TRIAL_MEMORY = Bytes(256 * MIB)
_TITLE = "Control groups"
_COSTS = "VMs cannot be kept to the processors and the memory that they were given"


async def cgroups(patient: Patient) -> Sequence[Finding]:
    """The groups that the daemon uses, or the first kind that works: systemd scopes, version 2, version 1."""
    used = patient.examination.probes.slices
    if used is not None:
        return [await _used(patient, used)]
    groups = own_groups(patient.root)
    failures: list[str] = []
    if (patient.root / "run/systemd/system").is_dir():
        failure = await _scope(patient)
        if not failure:
            where = "the system's" if patient.is_root else "the user's"
            proof = f"{where} systemd ran a program in a scope with a limit on processors and memory"
            return [_ok(proof)]
        failures.append(f"systemd-run: {failure}")
    unified = groups.get("")
    classic = {name: groups[name] for name in _CONTROLLERS if name in groups}
    if unified is not None and not classic:
        failure = _try_unified(unified)
        if not failure:
            proof = f"version 2: a group with limits on processors and memory was made below {unified.directory}"
            return [_ok(proof)]
        failures.append(f"version 2: {failure}")
    if classic:
        failure = _try_classic(classic)
        if not failure:
            return [_ok(f"version 1: groups were made and removed for {', '.join(classic)}")]
        failures.append(f"version 1: {failure}")
    fix, note = _fix(patient)
    return [
        Finding(
            id="cgroups",
            title=_TITLE,
            status=Status.DEGRADED,
            proof="; ".join(failures) if failures else "no hierarchy of control groups is mounted",
            costs=_COSTS,
            fix=fix,
            fix_note=note,
        )
    ]


async def _used(patient: Patient, slices: HostSlices) -> Finding:
    """Make a group with both limits the way VMs get theirs, and remove it."""
    trial = f"mica-doctor-{os.getpid()}"  # no VM's, for whoever looks for those of VMs
    handle: dict[str, Any] = {}
    failure = ""
    try:
        handle = await slices.create(trial, SliceLimits(cpus=1.0, memory=_TRIAL_MEMORY))
    except (MicaError, OSError) as error:
        failure = f"; a group could not be made: {error}"
    finally:
        await slices.remove(handle)
    if handle and not slices.reduced:
        return _ok(f"{slices.proof}: a group with limits on processors and memory was made and removed")
    fix, note = _fix(patient)
    if isinstance(slices, NoSlices) and slices.hint and not fix:
        note = slices.hint
    return Finding(
        id="cgroups",
        title=_TITLE,
        status=Status.DEGRADED,
        proof=f"{slices.proof}{failure}",
        costs="; ".join(slices.reduced) or _COSTS,
        fix=fix,
        fix_note=note,
    )


def _ok(proof: str) -> Finding:
    return Finding(id="cgroups", title=_TITLE, status=Status.OK, proof=proof)


def _fix(patient: Patient) -> tuple[tuple[str, ...], str]:
    if not (patient.root / "run/systemd/system").is_dir():
        return (), "run the daemon as root, or give its user a group to write to: docs/guides/doctor.md"
    if patient.is_root:
        return (), "in a container, start it with a control group namespace that may be written"
    # Version 2 delegates cpu to user sessions only when told; systemd.resource-control(5), Delegate=.
    line = r"[Service]\nDelegate=cpu cpuset io memory pids\n"
    directory = "/etc/systemd/system/user@.service.d"
    script = f"mkdir -p {directory} && printf '{line}' > {directory}/60-mica.conf && systemctl daemon-reload"
    return patient.fixes.command("sh", "-c", script), "then log in again"


async def _scope(patient: Patient) -> str:
    """Run a program in a transient scope with both limits. Returns what went wrong."""
    program = patient.program("systemd-run")
    if program is None:
        return "it is not installed"
    scope = ["--scope", "--quiet", "--collect", "--property=MemoryMax=256M", "--property=CPUQuota=100%"]
    manager = ["--system"] if patient.is_root else ["--user"]
    env = {"PATH": patient.examination.path, "XDG_RUNTIME_DIR": f"/run/user/{patient.examination.uid}"}
    try:
        answer = await ask(
            [program, *manager, *scope, "--", "/bin/cat", "/proc/self/cgroup"], timeout_s=_TIMEOUT_S, env=env
        )
    except MicaError as error:
        return error.message
    if answer.status:
        return answer.last_words or f"status {answer.status}"
    group = answer.text.strip().splitlines()[-1].partition("::")[2]
    if not group.endswith(".scope"):
        return f"the program ran in {group or 'no group'}, which is no scope"
    # Without delegation of a controller systemd makes the scope and leaves the limit out.
    controllers = patient.text(f"sys/fs/cgroup{Path(group).parent}/cgroup.subtree_control")
    lacking = [name for name in _CONTROLLERS if controllers is not None and name not in controllers.split()]
    return f"{', '.join(lacking)} not delegated to {Path(group).parent}" if lacking else ""


def _try_unified(group: Group) -> str:
    """Make a group below the nearest one whose children get both controllers."""
    for parent in group.upwards():
        enabled = _words(parent / "cgroup.subtree_control")
        if not all(name in enabled for name in _CONTROLLERS):
            continue
        return _trial(parent, "cgroup.procs")
    names = " and ".join(_CONTROLLERS)
    return f"no group above {group.directory} hands {names} to its children"


def _try_classic(groups: dict[str, Group]) -> str:
    lacking = [name for name in _CONTROLLERS if name not in groups]
    if lacking:
        return f"no hierarchy for {', '.join(lacking)}"
    for name, group in groups.items():
        failure = _trial(group.directory, "cgroup.procs")
        if failure:
            return f"{name}: {failure}"
    return ""


def _trial(parent: Path, member_file: str) -> str:
    """Make a group, see that processes could be put into it, remove it. Returns what went wrong."""
    trial = parent / f"mica-doctor-{os.getpid()}"
    try:
        trial.mkdir()
    except OSError as error:
        return f"no group can be made below {parent}: {error.strerror}"
    try:
        return "" if os.access(trial / member_file, os.W_OK) else f"{trial / member_file} cannot be written"
    finally:
        with contextlib.suppress(FileNotFoundError):
            trial.rmdir()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
