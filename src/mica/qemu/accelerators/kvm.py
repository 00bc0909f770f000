"""Prove KVM: run the canary on it in a child process that can be killed.

``/dev/kvm`` existing proves nothing, and neither does a module's name: there are hosts whose KVM opens, creates
machines and runs a BIOS, and then dies at ``cmpxchg16b``. Only the canary's answers count.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from mica.host.facts import read_boot_id
from mica.host.processes import CLEAN_ENVIRONMENT
from mica.host.programs import Answer, ask
from mica.model.doctor import AcceleratorProof
from mica.model.errors import Code, MicaError
from mica.qemu.accelerators import canary
from mica.qemu.accelerators.kvm_api import DEVICE, GET_API_VERSION
from mica.qemu.accelerators.kvm_canary import Line, StepBegun, VerdictLine
from mica.qemu.accelerators.tcg import canary_digest

_DEADLINE_S = 10.0
_PROBE = (sys.executable, "-m", "mica.qemu.accelerators.kvm_canary")
_PACKAGES = Path(__file__).parents[3]


class KvmProver:
    """``in_qemu`` tells whether the QEMU that would use it was built with KVM; ``user`` and ``uid`` are who we are.

    ``probe`` is the argument vector of the child (the device is added), ``root`` where ``proc`` and ``sys`` lie.
    """

    def __init__(
        self,
        *,
        in_qemu: bool,
        uid: int,
        user: str,
        device: str = DEVICE,
        deadline_s: float = _DEADLINE_S,
        probe: Sequence[str] = _PROBE,
        root: Path = Path("/"),
        architecture: str = os.uname().machine,
    ) -> None:
        self._in_qemu = in_qemu
        self._uid = uid
        self._user = user
        self._device = device
        self._deadline_s = deadline_s
        self._probe = tuple(probe)
        self._root = root
        self._architecture = architecture

    @property
    def name(self) -> str:
        return "kvm"

    def key(self) -> str:
        """Boot, device, API version, kernel release, and the builds of the modules as far as they can be read."""
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return ""  # who may not open it today may be allowed to tomorrow, without a reboot
        try:
            version = fcntl.ioctl(descriptor, GET_API_VERSION, 0)
            device = os.fstat(descriptor).st_rdev
            boot = read_boot_id(self._root)
        except (OSError, MicaError):
            return ""
        finally:
            os.close(descriptor)
        parts = [boot, f"{device:x}", str(version), os.uname().release, *self._modules(), canary_digest()]
        return " ".join([*parts, f"qemu={self._in_qemu}"])

    def _modules(self) -> list[str]:
        """What identifies the loaded modules. The inode of a module's directory changes when it is loaded again."""
        out = []
        for directory in sorted((self._root / "sys/module").glob("kvm*")):
            words = [directory.name, str(directory.stat().st_ino)]
            for name in ("srcversion", "notes/.note.gnu.build-id"):
                try:
                    words.append((directory / name).read_bytes().strip().hex()[-40:])
                except OSError:
                    words.append("")  # built in, or built without
            out.append(":".join(words))
        return out

    async def prove(self) -> AcceleratorProof:
        if self._architecture != "x86_64":
            return _proof(_no(f"this host is {self._architecture}: its KVM cannot run x86_64 guests"))
        if not self._in_qemu:
            return _proof(_no("this QEMU was built without KVM"), "apt-get install -y qemu-system-x86")
        try:
            os.close(os.open(self._device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return self._cannot_open(error)
        try:
            # The child finds this very package, wherever it was imported from.
            environment: Mapping[str, str] = {**CLEAN_ENVIRONMENT, "PYTHONPATH": str(_PACKAGES)}
            answer = await ask([*self._probe, self._device], timeout_s=self._deadline_s, env=environment)
        except MicaError as error:
            if error.code is not Code.TIMEOUT:
                return _proof(_no(f"the probe did not run: {error.message}"))
            steps, _ = _read(str(error.details.get("said", "")).encode())
            where = f"in step {steps[-1]}" if steps else "before its first step"
            return _proof(_no(f"the guest did not come back within {self._deadline_s:g} s, {where}"))
        return _proof(_verdict(answer))

    def _cannot_open(self, error: OSError) -> AcceleratorProof:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return self._absent()
        if error.errno in (errno.EACCES, errno.EPERM) and self._uid != 0:
            return self._forbidden()
        policy = " even for root: a container or a device policy forbids it" if self._uid == 0 else ""
        return _proof(_no(f"{self._device} cannot be opened: {error.strerror}{policy}"))

    def _absent(self) -> AcceleratorProof:
        try:
            flags = (self._root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
        except OSError:
            flags = []
        for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
            if flag in flags:
                reason = f"there is no {self._device}, though the processor has {flag}: the module is not loaded"
                return _proof(_no(reason), f"{self._sudo}modprobe {module}")
        return _proof(
            _no(
                f"there is no {self._device}, and the processor shows neither vmx nor svm: virtualization is off in "
                "the firmware, or this is a virtual machine without nested virtualization"
            )
        )

    def _forbidden(self) -> AcceleratorProof:
        status = Path(self._device).stat()
        mode = stat.S_IMODE(status.st_mode)
        try:
            group = grp.getgrgid(status.st_gid).gr_name
        except KeyError:
            group = str(status.st_gid)
        reason = f"permission: {self._device} is open to group {group} (mode {mode:04o}), and {self._user} is not in it"
        fix = f"sudo usermod -aG {group} {self._user}"
        if mode & 0o060 != 0o060 or status.st_gid == 0:
            reason = f"permission: {self._device} (group {group}, mode {mode:04o}) is closed to {self._user}"
            fix = (
                f"sudo chgrp kvm {self._device} && sudo chmod 0660 {self._device} && sudo usermod -aG kvm {self._user}"
            )
        return _proof(_no(f"{reason}; so nothing is proven"), fix)

    @property
    def _sudo(self) -> str:
        return "" if self._uid == 0 else "sudo "


def _no(reason: str) -> canary.Verdict:
    return canary.Verdict(works=False, reason=reason)


def _proof(verdict: canary.Verdict, fix: str = "") -> AcceleratorProof:
    return AcceleratorProof(
        name="kvm",
        works=verdict.works,
        reason=verdict.reason,
        fix=fix,
        loop_ratio=verdict.loop_ratio,
        steps=verdict.steps,
    )


def _read(text: bytes) -> tuple[list[str], canary.Verdict | None]:
    """The steps that the probe began and its verdict, as far as it came."""
    steps: list[str] = []
    verdict = None
    for raw in text.splitlines():
        try:
            line = msgspec.json.decode(raw, type=Line)
        except msgspec.MsgspecError:
            break  # it was killed in the middle of a line
        if isinstance(line, StepBegun):
            steps.append(line.step)
        elif isinstance(line, VerdictLine):
            verdict = line.verdict
    return steps, verdict


def _verdict(answer: Answer) -> canary.Verdict:
    steps, verdict = _read(answer.out)
    if verdict is not None and answer.status == 0:
        return verdict
    said = f": {answer.last_words}" if answer.err else ""
    return _no(f"the probe ended with status {answer.status} in step {steps[-1] if steps else 'none'}{said}")
