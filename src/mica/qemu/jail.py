"""The jail around one QEMU: what it may see, as whom it runs, and proof that the jail holds on this host.

Under software emulation (TCG) this jail is the only boundary between a guest and the host: QEMU promises security
only for virtualization with KVM (QEMU manual, "Security", use cases). So QEMU runs in namespaces of its own, made by
bubblewrap (mount, pid, network, ipc, uts, cgroup; user too when Mica is not root), sees the system's programs
read-only and its own files at their own paths, and keeps no capability. Its network namespace is empty, but for a VM on
QEMU's own user mode.

Three kinds, strongest first:

    root   namespaces, and a user id of the VM's own (setpriv inside the namespaces)
    user   namespaces in a user namespace; the user id is the daemon's
    off    none: only QEMU's seccomp filter is left. Asked for by name, and refused to root

This module decides and builds argument vectors; :mod:`mica.qemu.jailed` starts and finds jailed processes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from mica.host.processes import CLEAN_ENVIRONMENT, ResourceLimits
from mica.model.errors import Code, MicaError, invalid

FIRST_UID = 0x7D49_0000
"""2,101,936,128: above the ranges that systemd (containers: 524288 to 1879048191; foreign: from 0x7FFE0000), sub-ids
(from 100000) and SSSD (to 2000200000) hand out, and below 2^31, where old programs go wrong. See "Users, Groups, UIDs
and GIDs on systemd Systems"."""
SLOTS = 16384

_TMP_BYTES = 64 * 1024**2
_ROOT_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
_NAMESPACES = ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
_PROBE_TIMEOUT_S = 10.0
_OFF_HINT = "or, as an ordinary user, start the daemon with the jail off, which leaves only QEMU's seccomp filter"


class JailKind(StrEnum):
    ROOT = "root"
    USER = "user"
    OFF = "off"


class JailUser(msgspec.Struct, frozen=True):
    """Whom a process runs as."""

    uid: int
    gid: int


class JailUsers(msgspec.Struct, frozen=True):
    """User ids by slot: one for a VM's QEMU, another for its network process, none shared between VMs.

    ``first`` is the start of a range of ``2 * SLOTS`` ids that nobody else on the host uses.
    """

    first: int = FIRST_UID

    def vm(self, slot: int) -> JailUser:
        return self._user(slot, 0)

    def network(self, slot: int) -> JailUser:
        return self._user(slot, SLOTS)

    def _user(self, slot: int, offset: int) -> JailUser:
        if not 0 <= slot < SLOTS:
            raise invalid(f"slot {slot} is not between 0 and {SLOTS - 1}", hint="delete VMs that are not needed")
        number = self.first + offset + slot
        return JailUser(number, number)


class JailSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one process gets to see, at the same paths as outside, and how it is held.

    ``writable`` and ``readable`` are files or directories; ``devices`` are device nodes beyond null, zero, full,
    random, urandom and tty. ``user`` is needed by the kind ``root`` and ignored by the others. ``oom_score_adj``
    (-1000 to 1000) makes the kernel prefer a VM to the rest of the host when memory runs out. ``host_network`` leaves
    the process in the host's network namespace, for a QEMU that opens a guest's connections itself.
    """

    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()
    user: JailUser | None = None
    hostname: str = "vm"
    limits: ResourceLimits = ResourceLimits()
    oom_score_adj: int = 500
    host_network: bool = False


class JailFds(msgspec.Struct, frozen=True):
    """Descriptors of bubblewrap's own: where it tells the pid, what it waits for, where it notes the exit status."""

    info: int
    block: int
    status: int


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """How this host jails. Made by :func:`detect`; ``proof`` tells what a trial run inside showed."""

    kind: JailKind
    bwrap: str = ""
    setpriv: str = ""
    disable_userns: bool = False
    system: tuple[Path, ...] = ()
    proof: str = ""

    @property
    def reduced(self) -> tuple[str, ...]:
        """What is less than the full jail, for ``doctor`` and ``vm show``."""
        if self.kind is JailKind.USER:
            return ("QEMU has the daemon's user id; only its mount namespace hides other files of that user",)
        if self.kind is JailKind.OFF:
            return ("QEMU runs without a jail: files, processes and network of the daemon's user are open to it",)
        return ()

    def wrap(self, argv: Sequence[str], spec: JailSpec, fds: JailFds | None = None) -> list[str]:
        """The argument vector that runs ``argv`` (``argv[0]`` absolute) jailed.

        Raises ``host-lacks`` when a device cannot be opened by the jailed user.
        """
        if self.kind is JailKind.OFF:
            return [self.setpriv, "--no-new-privs", "--inh-caps=-all", "--", *argv]
        return [*self._bubblewrap(spec, fds), "--", *self._become(spec), *argv]

    def _bubblewrap(self, spec: JailSpec, fds: JailFds | None) -> list[str]:
        # As pid 1 of its namespace there is no helper between bubblewrap and the program, so the pid that the info
        # descriptor tells is the program's. Never --die-with-parent: VMs outlive the daemon.
        out = [self.bwrap, *_NAMESPACES, *(() if spec.host_network else ("--unshare-net",))]
        out += ["--as-pid-1", "--new-session", "--hostname", spec.hostname, "--clearenv"]
        for name, value in CLEAN_ENVIRONMENT.items():
            out += ["--setenv", name, value]
        out += ["--cap-drop", "ALL"]
        if self.kind is JailKind.ROOT:
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # for setpriv, which drops them too
                out += ["--cap-add", capability]
        else:
            out += ["--unshare-user", *(("--disable-userns",) if self.disable_userns else ())]
        if fds is not None:
            out += ["--info-fd", f"{fds.info}", "--block-fd", f"{fds.block}", "--json-status-fd", f"{fds.status}"]
        return [*out, *self._mounts(spec)]

    def _mounts(self, spec: JailSpec) -> list[str]:
        out = ["--ro-bind", "/usr", "/usr"]
        for name in _ROOT_LINKS:  # links into /usr on merged systems, directories on others
            path = Path("/", name)
            if path.is_symlink():
                out += ["--symlink", str(path.readlink()), str(path)]
            elif path.is_dir():
                out += ["--ro-bind", str(path), str(path)]
        out += ["--dev", "/dev", "--proc", "/proc", "--perms", "1777", "--size", str(_TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108 - inside the jail, its own
        for parent in _parents((*self.system, *spec.readable, *spec.writable, *spec.devices)):
            out += ["--perms", "0755", "--dir", str(parent)]  # bubblewrap would make them 0700, closed to the VM's user
        for file in _SYSTEM_FILES:
            out += ["--ro-bind-try", file, file]
        for path in (*self.system, *spec.readable):
            out += ["--ro-bind", str(path), str(path)]
        for path in spec.writable:
            out += ["--bind", str(path), str(path)]
        for path in spec.devices:
            out += ["--dev-bind", str(path), str(path)]
        return [*out, "--remount-ro", "/dev", "--remount-ro", "/"]

    def _become(self, spec: JailSpec) -> list[str]:
        if self.kind is not JailKind.ROOT:
            _check_devices(spec.devices)
            return []
        if spec.user is None or spec.user.uid == 0 or spec.user.gid == 0:
            raise invalid("a jail made by root needs a user id other than root's")
        groups = _device_groups(spec.devices)
        return [
            self.setpriv,
            *(f"--reuid={spec.user.uid}", f"--regid={spec.user.gid}"),
            f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--"),
        ]


async def detect(*, root: bool, off: bool = False, system: tuple[Path, ...] = ()) -> Jail:
    """Find the strongest jail that this host allows, and prove it by running a program in it (about 20 ms).

    ``off`` asks for none; ``system`` are directories to show besides /usr where QEMU lives elsewhere.
    Raises ``host-lacks`` naming what is missing and the command that adds it, ``forbidden`` for root without a jail.
    """
    setpriv = _program("setpriv", "util-linux")
    if off:
        if root:
            raise MicaError(
                Code.FORBIDDEN,
                "root must not run QEMU without a jail",
                hint="leave the jail on, or run the daemon as an ordinary user",
            )
        return Jail(kind=JailKind.OFF, setpriv=setpriv, proof="switched off by a setting")
    bwrap = _program("bwrap", "bubblewrap")
    kind = JailKind.ROOT if root else JailKind.USER
    jail = Jail(kind=kind, bwrap=bwrap, setpriv=setpriv, system=system, disable_userns=kind is JailKind.USER)
    failure = await _trial(jail)
    if failure and jail.disable_userns:
        jail = msgspec.structs.replace(jail, disable_userns=False)  # an older bubblewrap, or a policy against nesting
        failure = await _trial(jail)
    if failure:
        raise MicaError(Code.HOST_LACKS, f"bubblewrap cannot make a jail here: {failure}", hint=advice(root))
    return msgspec.structs.replace(
        jail, proof="a program run in it had CapEff 0, NoNewPrivs 1 and was alone with pid 1"
    )


async def _trial(jail: Jail) -> str:
    """Run a program jailed and look at it from inside. Returns what went wrong, empty when nothing did."""
    spec = JailSpec(user=JailUser(FIRST_UID + 2 * SLOTS, FIRST_UID + 2 * SLOTS))
    argv = jail.wrap(["/usr/bin/cat", "/proc/self/status"], spec)
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(CLEAN_ENVIRONMENT),
    )
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        return f"a trial run did not end within {_PROBE_TIMEOUT_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        return errors.decode(errors="replace").strip() or f"exit status {process.returncode}"
    seen = dict(line.split(":\t", 1) for line in output.decode().splitlines() if ":\t" in line)
    wanted = {"CapEff": "0" * 16, "CapPrm": "0" * 16, "NoNewPrivs": "1", "Pid": "1"}
    wrong = [f"{key} is {seen.get(key)}" for key, value in wanted.items() if seen.get(key) != value]
    if jail.kind is JailKind.ROOT and spec.user is not None and seen.get("Uid", "").split() != [str(spec.user.uid)] * 4:
        wrong.append(f"Uid is {seen.get('Uid')}")
    return ", ".join(wrong)


def advice(root: bool, sysctl: Path = Path("/proc/sys")) -> str:
    """The most likely reason why namespaces are refused, as the command that allows them."""

    def value(name: str) -> str | None:
        try:
            return (sysctl / name).read_text(encoding="ascii").strip()
        except OSError:
            return None

    if value("user/max_user_namespaces") == "0" and not root:
        return f"sudo sysctl -w user.max_user_namespaces=65536, {_OFF_HINT}"
    if value("kernel/unprivileged_userns_clone") == "0" and not root:
        return f"sudo sysctl -w kernel.unprivileged_userns_clone=1, {_OFF_HINT}"
    if value("kernel/apparmor_restrict_unprivileged_userns") == "1" and not root:
        return (
            "AppArmor forbids user namespaces to bwrap: mica doctor --fix gives it a profile that allows them, "
            f"or sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 allows them to all, {_OFF_HINT}"
        )
    if root:
        return "inside a container, start it with the right to create namespaces (for example --privileged)"
    return f"run the daemon as root, {_OFF_HINT}"


def hand_over(path: Path, user: JailUser | None) -> None:
    """Make a file (0600) or directory (0700, with what is in it) the user's alone; ``None`` leaves the owner.

    Never follows a symbolic link: what lies there may have been written by a guest's QEMU.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if user is not None:
            os.fchown(descriptor, user.uid, user.gid)
        os.fchmod(descriptor, 0o700 if directory else 0o600)
        names = os.listdir(descriptor) if directory else []
    finally:
        os.close(descriptor)
    for name in names:
        entry = path / name
        mode = entry.lstat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            hand_over(entry, user)
        elif user is not None:
            os.chown(entry, user.uid, user.gid, follow_symlinks=False)


def _parents(paths: Sequence[Path]) -> list[Path]:
    """Directories above the paths that the jail has to make, outermost first."""
    made = {Path("/"), Path("/dev"), Path("/tmp")}  # noqa: S108 - inside the jail
    above = {Path("/etc")} | {parent for path in paths for parent in path.parents}
    return sorted(parent for parent in above - made if not parent.is_relative_to("/usr"))


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=CLEAN_ENVIRONMENT["PATH"])
    if path is None:
        raise MicaError(
            Code.HOST_LACKS,
            f"the program {name} is missing, so QEMU cannot be jailed",
            hint=f"sudo apt-get install {package}",
            details={"program": name, "package": package},
        )
    return path


def _device_groups(devices: tuple[Path, ...]) -> list[int]:
    """Groups that open the devices to a user without other rights."""
    groups = set()
    for path in devices:
        status = path.stat()
        if status.st_mode & 0o006 == 0o006:
            continue
        if status.st_mode & 0o060 != 0o060 or status.st_gid == 0:
            raise MicaError(
                Code.HOST_LACKS,
                f"{path} is open to root alone (mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"sudo chgrp kvm {path} && sudo chmod 0660 {path}",
            )
        groups.add(status.st_gid)
    return sorted(groups)


def _check_devices(devices: tuple[Path, ...]) -> None:
    for path in devices:
        if not os.access(path, os.R_OK | os.W_OK):
            raise MicaError(
                Code.HOST_LACKS,
                f"{path} is not open to the daemon's user",
                hint=f"sudo adduser $USER {path.group()}, then sign in again",
            )
