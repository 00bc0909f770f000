"""A daemon in a home of its own, as a user would have it, and everything that belongs to it on this host.

Whatever a test does, :meth:`World.destroy` ends every process that names the home or its runtime directory and removes
what is left: files, guest RAM, control groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mica.client import Client
from mica.host.processes import find, reference
from mica.model.paths import api_socket, runtime_dir

T = TypeVar("T")

SOURCE = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0
_LOG_TAIL = 6000
_KEEP_TEMPLATES_S = 86400.0


def wait_for(what: str, look: Callable[[], T], *, timeout_s: float = 20.0) -> T:
    """Look until there is something; for what nothing signals. Fails with ``what``."""
    give_up, pause = time.monotonic() + timeout_s, 0.01
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < give_up, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)


class World:
    """One ``MICA_HOME``. ``settings`` are those of its ``config.toml``."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MICA_")}
        self.environ = {**kept, "MICA_HOME": str(home)}
        self.uid = os.geteuid()
        self.runtime = runtime_dir(home, self.environ, self.uid)
        self.sockets = Path("/tmp") / f"mica-net-{self.runtime.name}"  # where AppArmor keeps passt out of the other
        self.log = home / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True, mode=0o711)
        home.chmod(0o711)
        self.configure(**settings)

    def configure(self, **settings: str) -> None:
        """Images are not booted behind the tests' backs unless one wants that."""
        settings = {"boot_once": "false", **settings}
        (self.home / "config.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in settings.items()))

    # ---- the daemon

    @property
    def socket(self) -> Path:
        return api_socket(self.runtime)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start a daemon and do not wait for it."""
        self.log.touch(0o600)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mica.daemon", "--home", str(self.home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                cwd="/",
                start_new_session=True,
            )
        return self._process

    def start(self) -> None:
        """Start a daemon and wait until it answers."""
        process = self.spawn()
        give_up = time.monotonic() + START_TIMEOUT_S
        while not self.answers():
            assert process.poll() is None, f"the daemon ended with {process.returncode}:\n{self.log_tail(self.log)}"
            assert time.monotonic() < give_up, f"the daemon does not answer:\n{self.log_tail(self.log)}"
            time.sleep(0.02)

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            try:
                sock.connect(str(self.socket))
            except OSError:
                return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the daemon and wait until it is gone."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def restart(self) -> None:
        """``kill -9`` and a new daemon."""
        self.kill()
        self.start()

    def client(self) -> Client:
        return Client(home=self.home, autostart=False, environ=self.environ)

    def cli(self, *words: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """The ``mica`` command, with this home."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "mica", *words],
            env={**self.environ, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd="/",
            check=False,
        )

    # ---- what it has on this host

    def processes(self) -> dict[int, str]:
        """Every live process that names the home, the runtime directory or guest RAM, with its command line.

        The daemon and the commands of this test are not among them.
        """
        marks = (str(self.home), str(self.runtime), str(self.sockets))
        out = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (os.getpid(), self._process and self._process.pid):
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if any(mark in words for mark in marks):
                    out[int(entry.name)] = words
        return out

    def qemus(self) -> list[int]:
        return sorted(
            p for p, words in self.processes().items() if words.split()[0].rsplit("/", 1)[-1].startswith("qemu-system")
        )

    def groups(self) -> list[Path]:
        """Control groups of its VMs, of all hierarchies."""
        roots = Path("/sys/fs/cgroup").glob(f"**/mica-{self.runtime.name}*")
        return sorted(child for root in roots for child in root.iterdir() if child.is_dir())

    def cpu_limits(self) -> dict[str, float | None]:
        """VM id → host processors that its control group gives it (v1 or v2); ``None`` is no limit."""
        out: dict[str, float | None] = {}
        for group in self.groups():
            if (group / "cpu.cfs_quota_us").exists():
                quota = int((group / "cpu.cfs_quota_us").read_text())
                out[group.name] = None if quota < 0 else quota / int((group / "cpu.cfs_period_us").read_text())
            elif (group / "cpu.max").exists():
                first, period = (group / "cpu.max").read_text().split()
                out[group.name] = None if first == "max" else int(first) / int(period)
        return out

    def cpu_seconds(self, vm_id: str) -> float:
        """Processor time that a VM's control group has used."""
        for group in self.groups():
            if group.name == vm_id and (group / "cpuacct.usage").exists():
                return int((group / "cpuacct.usage").read_text()) / 1e9
            if group.name == vm_id and (group / "cpu.stat").exists() and not (group / "cpu.cfs_quota_us").exists():
                stat = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
                return int(stat["usage_usec"]) / 1e6
        raise AssertionError(f"no control group counts the processor time of {vm_id}")

    def leftovers(self) -> list[str]:
        """What a home without VMs should not have: processes, run directories, volumes, parts, logs, groups."""
        out = [f"process {pid}: {words[:200]}" for pid, words in self.processes().items()]
        for directory in (
            self.runtime / "vm",
            self.runtime / "net",
            self.sockets,
            self.home / "volumes",
            self.home / "logs",
            self.home / "parts",
            self.home / "parts" / ".scratch",
        ):
            if directory.is_dir():
                out += [str(entry) for entry in directory.iterdir() if not entry.name.startswith(".")]
        return out + [str(group) for group in self.groups()]

    def report(self) -> dict[str, str]:
        """Logs, for somebody who looks at a failed test."""
        files = [self.log, *sorted(self.home.glob("logs/*/console.log")), *sorted(self.home.glob("logs/*/qemu.log"))]
        return {str(file.relative_to(self.home)): self.log_tail(file) for file in files}

    @staticmethod
    def log_tail(file: Path) -> str:
        try:
            return file.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
        except OSError as error:
            return f"({error})"

    def destroy(self) -> None:
        """End everything and remove everything, whatever state it is in."""
        with contextlib.suppress(Exception):
            self.kill()
        give_up = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < give_up:
            for pid in left:
                _end(pid)
            time.sleep(0.02)
        for directory in (self.runtime, self.home):
            shutil.rmtree(directory, ignore_errors=True)
        for root in Path("/sys/fs/cgroup").glob(f"**/mica-{self.runtime.name}*"):
            for group in (*root.iterdir(), root):
                if group.is_dir():
                    with contextlib.suppress(OSError):
                        group.rmdir()


def _end(pid: int) -> None:
    """Kill by pidfd; a process that was stopped ends too."""
    ref = reference(pid)
    process = find(ref) if ref is not None else None
    if process is not None:
        with process, contextlib.suppress(Exception):
            process.kill()


# ---- a home with the micro image, made once


def _digest_of_images() -> str:
    """Changes when the code that builds images does."""
    digest = hashlib.sha256()
    for file in sorted((SOURCE / "src/mica/images").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _cache() -> Path:
    directory = SOURCE / ".cache" / "tests"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"mica-tests-{os.geteuid()}"


@functools.cache
def template() -> Path:
    """A home in which the product itself has built the image ``micro`` and proved its accelerators. Kept.

    Several test runs may want it at once: one makes it, the others wait.
    """
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    home = cache / f"home-{_digest_of_images()}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            _make_template(home)
            (home / "ready").touch()
    return home


def _make_template(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    world = World(home)
    for other in home.parent.glob("home-*"):
        packages = other / "cache" / "packages"
        if packages.is_dir() and not (home / "cache" / "packages").exists():  # what was downloaded already
            shutil.copytree(packages, home / "cache" / "packages", copy_function=_link)
        if time.time() - other.stat().st_mtime > _KEEP_TEMPLATES_S:
            shutil.rmtree(other, ignore_errors=True)
    try:
        world.start()
        done = world.cli("image", "build", "micro", timeout_s=600)
        assert done.returncode == 0, done.stderr + world.log_tail(world.log)
    except BaseException:
        world.destroy()
        raise
    world.kill(signal.SIGTERM)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


async def _has_image(world: World) -> None:
    """A daemon looks for image files that it does not know of right after its start."""
    async with asyncio.timeout(20), world.client() as client:
        while not await client.images.list():
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def new_world(*, link: bool = True, start: bool = True, **settings: str) -> Iterator[World]:
    """A fresh home with the image in it; ``link=False`` copies the image's files so that they may be damaged."""
    source = template()
    world = World(Path(tempfile.mkdtemp(prefix="mica-")), **settings)
    try:
        for name in ("images", "cache"):
            ignore = shutil.ignore_patterns("packages")
            copy = _link if link and name == "images" else shutil.copy2
            shutil.copytree(source / name, world.home / name, copy_function=copy, ignore=ignore)
        if start:
            world.start()
            asyncio.run(_has_image(world))
        yield world
    finally:
        world.destroy()
