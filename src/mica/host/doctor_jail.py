"""Privileges, the jail around QEMU, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence

from mica.host.doctor_base import Patient
from mica.host.programs import ask
from mica.model.doctor import Finding, Status
from mica.model.errors import MicaError

_TRIAL_TIMEOUT_S = 15.0
_NAMESPACES = (
    *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
    *("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"),
)
_APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"
# (setting, the value that forbids, the value that allows)
_USERNS_SETTINGS = (
    ("kernel.unprivileged_userns_clone", "0", 1),
    ("user.max_user_namespaces", "0", 65536),
)


async def privileges(patient: Patient) -> Sequence[Finding]:
    """Whether namespaces can be made, by making them."""
    examination = patient.examination
    who = f"running as {examination.user} (uid {examination.uid})"
    title = "Privileges"
    bwrap = patient.program("bwrap")
    if bwrap is None:
        return [
            Finding(
                id="privileges",
                title=title,
                status=Status.MISSING,
                proof=f"{who}; bwrap (bubblewrap) is not installed, so no namespace could be tried",
                costs="QEMU cannot be jailed, so no virtual machine is started unless an ordinary user insists",
                fix=patient.fixes.install(["bwrap"]),
            )
        ]
    # Root needs no user namespace: it makes the others directly.
    arguments = _NAMESPACES[1:] if patient.is_root else _NAMESPACES
    answer = await ask([bwrap, *arguments, "--", "/bin/sh", "-c", "exit 0"], timeout_s=_TRIAL_TIMEOUT_S)
    kinds = "pid, network, ipc, uts and mount" if patient.is_root else "user, pid, network, ipc, uts and mount"
    if answer.status == 0:
        each = "; each VM gets a user id of its own" if patient.is_root else "; VMs run under this user's id"
        proof = f"{who}; bubblewrap made {kinds} namespaces{each}"
        return [Finding(id="privileges", title=title, status=Status.OK, proof=proof)]
    fix, note = _userns_fix(patient, bwrap)
    return [
        Finding(
            id="privileges",
            title=title,
            status=Status.MISSING,
            proof=f"{who}; bubblewrap could not make {kinds} namespaces: {answer.last_words or 'it said nothing'}",
            costs="QEMU cannot be jailed, and images cannot be built without root",
            fix=fix,
            fix_note=note,
        )
    ]


def _userns_fix(patient: Patient, bwrap: str) -> tuple[tuple[str, ...], str]:
    """The kernel setting that forbids it, if it is one."""
    if patient.is_root:
        return (), "inside a container, start it with the right to make namespaces (for example --privileged)"
    for name, forbids, allows in _USERNS_SETTINGS:
        if patient.setting(name) == forbids:
            note = f"{name} is {forbids}, which forbids user namespaces to ordinary users"
            return patient.fixes.sysctl(name, allows), note
    if patient.setting(_APPARMOR) == "1":
        note = f"{_APPARMOR} is 1, which forbids user namespaces to programs without a profile; this gives {bwrap} one"
        return patient.fixes.allow_namespaces(bwrap), note
    return (), "run the daemon as root, or ask whoever runs this container to allow user namespaces"


async def jail(patient: Patient) -> Sequence[Finding]:
    try:
        found = await patient.examination.probes.jail()
    except MicaError as error:
        return [
            Finding(
                id="jail",
                title="Jail",
                status=Status.MISSING,
                proof=error.message,
                costs="no virtual machine is started without a jail, unless an ordinary user switches it off",
                fix=patient.fixes.install([str(error.details["program"])]) if "program" in error.details else (),
                fix_note=error.hint,
            )
        ]
    if found.kind == "off":
        return [
            Finding(
                id="jail",
                title="Jail",
                status=Status.DEGRADED,
                proof=found.proof,
                costs="; ".join(found.reduced),
                fix_note="remove jail = off from the settings",
            )
        ]
    kind = "with a user id for each VM" if found.kind == "root" else "in a user namespace"
    proof = f"{kind}: {found.proof}"
    if not found.reduced:
        return [Finding(id="jail", title="Jail", status=Status.OK, proof=proof)]
    return [
        Finding(
            id="jail",
            title="Jail",
            status=Status.OK,
            proof=f"{proof} (less than root's: {'; '.join(found.reduced)})",
        )
    ]


async def boundary(patient: Patient) -> Sequence[Finding]:
    """What stands between a guest and this host."""
    working = [proof.name for proof in patient.proofs if proof.works]
    if not working:
        return []
    title = "Boundary"
    if working[0] != "tcg":
        proof = f"{working[0].upper()} was proven: between a guest and this host stand the hardware and the jail"
        return [Finding(id="boundary", title=title, status=Status.OK, proof=proof)]
    return [
        Finding(
            id="boundary",
            title=title,
            status=Status.DEGRADED,
            proof="guests run in software emulation (TCG), for which QEMU gives no security promise",
            costs="the jail is the only boundary between a guest and this host; do not run guests that you do not "
            "trust beside what must not be lost",
            fix_note="only an accelerator that works closes this",
        )
    ]
