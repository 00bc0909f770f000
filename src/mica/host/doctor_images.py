"""What images need: qemu-img, firmware, and the programs that build them."""

from __future__ import annotations

from collections.abc import Sequence

from mica.host.doctor_base import Patient
from mica.host.programs import ask
from mica.model.doctor import Finding, Status

_TIMEOUT_S = 15.0
_BUILDERS = ("apt-get", "dpkg-deb", "mmdebstrap", "mke2fs", "sfdisk", "mcopy")
_SUB_IDS = 65536


async def disk_images(patient: Patient) -> Sequence[Finding]:
    title = "Disk images"
    path = patient.program("qemu-img")
    if path is None:
        return [
            Finding(
                id="qemu-img",
                title=title,
                status=Status.DEGRADED,
                proof="qemu-img is not installed",
                costs="no VM with a disk: disks can be neither made nor imported",
                fix=patient.fixes.install(["qemu-img"]),
            )
        ]
    answer = await ask([path, "--version"], timeout_s=_TIMEOUT_S)
    words = answer.text.splitlines()[:1]
    if answer.status or not words:
        return [
            Finding(
                id="qemu-img",
                title=title,
                status=Status.DEGRADED,
                proof=f"{path} --version ended with status {answer.status}: {answer.last_words}",
                costs="no VM with a disk: disks can be neither made nor imported",
                fix=patient.fixes.install(["qemu-img"]),
            )
        ]
    return [Finding(id="qemu-img", title=title, status=Status.OK, proof=f"{path} was run: {words[0]}")]


async def firmware(patient: Patient) -> Sequence[Finding]:
    title = "UEFI firmware"
    found = patient.examination.probes.firmware()
    if found is None:
        return [
            Finding(
                id="uefi",
                title=title,
                status=Status.DEGRADED,
                proof="no OVMF was found, neither by descriptor nor where distributions put it",
                costs="VMs that boot by UEFI cannot start, such as the debian image from its own disk",
                fix=patient.fixes.install(["ovmf"]),
            )
        ]
    proof = f"{found.code} and {found.vars} are there and can be read"
    for file in (found.code, found.vars):
        if not _first_byte(file):
            proof = f"{file} is empty"
            fix = patient.fixes.install(["ovmf"])
            return [Finding(id="uefi", title=title, status=Status.DEGRADED, proof=proof, costs="no UEFI", fix=fix)]
    return [Finding(id="uefi", title=title, status=Status.OK, proof=proof)]


def _first_byte(file: str) -> bytes:
    with open(file, "rb") as readable:
        return readable.read(1)


async def building(patient: Patient) -> Sequence[Finding]:
    """Whether images can be built: the programs, and for ordinary users a range of sub-ids that can be mapped."""
    title = "Image building"
    missing = [name for name in _BUILDERS if patient.program(name) is None]
    if missing:
        debian = patient.fixes.family == "debian"
        return [
            Finding(
                id="images",
                title=title,
                status=Status.DEGRADED,
                proof=f"not installed: {', '.join(missing)}",
                costs="images cannot be built here; they can be imported",
                fix=patient.fixes.install(missing) if debian else (),
                fix_note="" if debian else "images are built from Debian's packages; build them on Debian or Ubuntu",
            )
        ]
    found = f"{', '.join(_BUILDERS)} are there"
    if patient.is_root:
        return [Finding(id="images", title=title, status=Status.OK, proof=f"{found}; root needs no sub-ids")]
    failure, fix = await _map_ids(patient)
    if not failure:
        proof = f"{found}; a user namespace with a range of sub-ids was made"
        return [Finding(id="images", title=title, status=Status.OK, proof=proof)]
    return [
        Finding(
            id="images",
            title=title,
            status=Status.DEGRADED,
            proof=f"{found}, but {failure}",
            costs="full images such as debian cannot be built without root; micro can",
            fix=fix,
        )
    ]


async def _map_ids(patient: Patient) -> tuple[str, tuple[str, ...]]:
    """Map the user's sub-ids in a namespace, as mmdebstrap does. Returns what went wrong, and the command for it."""
    if patient.program("newuidmap") is None:
        return "newuidmap is not installed", patient.fixes.install(["newuidmap"])
    user, uid = patient.examination.user, str(patient.examination.uid)
    for name in ("subuid", "subgid"):
        lines = [line.split(":") for line in (patient.text(f"etc/{name}") or "").splitlines()]
        if not any(len(f) == 3 and f[0] in (user, uid) and f[2].isdigit() and int(f[2]) >= _SUB_IDS for f in lines):
            first = max([100_000, *(int(f[1]) + int(f[2]) for f in lines if len(f) == 3 and f[2].isdigit())])
            span = f"{first}-{first + _SUB_IDS - 1}"
            add = patient.fixes.command("usermod", "--add-subuids", span, "--add-subgids", span, user)
            return f"/etc/{name} gives {user} no {_SUB_IDS} sub-ids", add
    helper = [patient.program("mmdebstrap") or "mmdebstrap", "--unshare-helper", "/bin/true"]
    answer = await ask(helper, timeout_s=_TIMEOUT_S)
    if answer.status:
        return f"mapping them failed: {answer.last_words}", ()
    return "", ()
