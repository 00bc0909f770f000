"""The jail, looked at from inside: a program in it tries what it must not be able to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mica.host.processes import ExitStatus, ResourceLimits, find, reference
from mica.model.errors import Code, MicaError
from mica.qemu.jail import FIRST_UID, SLOTS, Jail, JailFds, JailKind, JailSpec, JailUser, JailUsers, advice, detect
from mica.qemu.jail import hand_over as give
from mica.qemu.jailed import Jailed, JailedRefs, adopt, exit_code, find_left, start

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
as_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not as_root, reason="needs root")


@pytest.fixture
async def jail() -> Jail:
    return await detect(root=as_root)


class Cell:
    """One jailed shell script with a directory of its own."""

    def __init__(self, jail: Jail, base: Path, slot: int = 5) -> None:
        self.jail, self.base = jail, base
        self.user = JailUsers().vm(slot) if jail.kind is JailKind.ROOT else None
        self.home = base / f"vm-{slot}"
        self.home.mkdir()
        give(self.home, self.user)
        self.output = base / "output"
        self.status_file = base / "status"
        self.running: list[Jailed] = []

    async def start(self, script: str, spec: JailSpec | None = None, **options: object) -> Jailed:
        spec = spec or JailSpec()
        spec = msgspec.structs.replace(spec, user=self.user, writable=(self.home, *spec.writable))
        argv = ["/usr/bin/sh", "-c", script]
        jailed = await start(
            self.jail,
            argv,
            spec,
            status_file=self.status_file,
            output=self.output,
            **options,  # type: ignore[arg-type]
        )
        self.running.append(jailed)
        return jailed

    async def run(self, script: str, spec: JailSpec | None = None, **options: object) -> tuple[ExitStatus, str]:
        before = self.output.stat().st_size if self.output.exists() else 0
        jailed = await self.start(script, spec, **options)
        return await jailed.wait_exit(20), self.output.read_text()[before:]


@pytest.fixture
async def cell(jail: Jail, tmp_path: Path) -> AsyncIterator[Cell]:
    cell = Cell(jail, tmp_path)
    yield cell
    for jailed in cell.running:
        jailed.process.kill()
        await jailed.wait_exit(10)
        jailed.close()


@needs_bwrap
async def test_other_files_and_the_daemons_socket_are_out_of_sight(cell: Cell) -> None:
    other = cell.base / "other"
    other.mkdir(mode=0o777)
    other.chmod(0o777)
    secret = other / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    cell.base.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(cell.base / "daemon.sock"))
        daemon.listen()
        status, text = await cell.run(
            f"ls {cell.base}; cat {secret}; ls -A /home /root /var /run /srv /sys; ls -A /etc; ls -d /*"
        )
    assert status.code == 0
    lines = text.splitlines()
    assert lines[0] == cell.home.name  # the only thing to see where it lies
    assert lines[1].endswith("No such file or directory")
    assert "secret" not in "".join(lines[2:])
    assert {line for line in lines if line.startswith("/")} <= {
        *("/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/tmp", "/usr")
    }
    assert {line for line in lines if line.isidentifier() and len(line) < 20} <= {"alternatives", "localtime", "output"}
    assert "passwd" not in text
    assert "shadow" not in text


@needs_bwrap
async def test_only_its_own_files_can_be_written(cell: Cell) -> None:
    image = cell.base / "image"
    image.write_text("image")
    image.chmod(0o666)
    status, text = await cell.run(
        f"echo mine > {cell.home}/file && cat {cell.home}/file; cat {image}; "
        f"for p in {image} /x /dev/x /dev/shm/x /usr/x /etc/x /proc/sys/kernel/hostname;"
        " do (echo x > $p) || echo held $p; done 2>/dev/null; echo t > /tmp/t && cat /tmp/t",
        JailSpec(readable=(image,)),
    )
    assert status.code == 0
    assert text.startswith("mine\nimage")
    assert text.count("held") == 7
    assert text.endswith("t\n")
    assert image.read_text() == "image"
    written = (cell.home / "file").stat()
    assert written.st_uid == (cell.user.uid if cell.user else os.geteuid())


@needs_bwrap
async def test_processes_of_the_host_are_out_of_reach(cell: Cell) -> None:
    status, text = await cell.run(
        "ls /proc | grep -c '^[0-9]'; cat /proc/1/cmdline | tr '\\0' ' '; echo; "
        f"kill -0 {os.getpid()} || echo unreachable"
    )
    assert status.code == 0
    lines = text.splitlines()
    assert int(lines[0]) <= 4  # the shell and its pipeline
    assert lines[1].startswith("/usr/bin/sh -c")
    assert lines[-1] == "unreachable"


@needs_bwrap
async def test_the_network_is_empty(cell: Cell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = (
            "cat /proc/net/dev | grep -c :; exec /usr/bin/perl -MIO::Socket::INET -e '"
            f'print IO::Socket::INET->new(PeerAddr=>"127.0.0.1:{port}",Timeout=>2) ? "reached" : "refused: $!"\''
        )
        status, text = await cell.run(script)
        control = await asyncio.create_subprocess_exec(
            "/usr/bin/sh", "-c", script.replace("exec ", ""), stdout=asyncio.subprocess.PIPE
        )
        reached = (await control.communicate())[0].decode()
    assert "reached" in reached  # outside the jail the same words do reach it
    assert status.code == 0
    assert text.splitlines()[0] == "1"  # its own loopback, down or alone
    assert "refused" in text


@needs_bwrap
async def test_no_privilege_is_left(cell: Cell) -> None:
    status, text = await cell.run("cat /proc/self/status; env; ls -l /proc/self/fd | grep -c -v -e total; hostname")
    assert status.code == 0
    seen = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(seen[name], 16) == 0
    assert seen["NoNewPrivs"] == "1"
    if cell.user is not None:
        assert seen["Uid"].split() == [str(cell.user.uid)] * 4
        assert seen["Gid"].split() == [str(cell.user.gid)] * 4
        assert seen["Groups"].split() == []
        assert int(seen["CapBnd"], 16) == 0
    assert {line.split("=")[0] for line in text.splitlines() if "=" in line} <= {"PATH", "LC_ALL", "PWD"}
    assert text.splitlines()[-2:] == ["4", "vm"]  # 0, 1, 2 and the directory that ls itself reads


@needs_bwrap
async def test_limits_groups_and_oom_score_hold_before_it_runs(cell: Cell) -> None:
    joined: list[tuple[int, str]] = []

    async def before(pid: int) -> None:
        await asyncio.sleep(0)
        joined.append((pid, os.readlink(f"/proc/{pid}/exe")))

    status, text = await cell.run(
        "ulimit -n; ulimit -c; ulimit -f; cat /proc/self/oom_score_adj; grep SigIgn /proc/self/status",
        JailSpec(limits=ResourceLimits(open_files=321, core=0, file_size=1 << 20), oom_score_adj=700),
        before=before,
    )
    assert status.code == 0
    lines = text.splitlines()
    assert lines[:4] == ["321", "0", str((1 << 20) // 512), "700"]
    assert int(lines[4].split()[1], 16) & (1 << (signal.SIGXFSZ - 1))
    jailed = cell.running[-1]
    assert jailed.keeper is not None
    assert [pid for pid, _ in joined] == [jailed.keeper.pid, jailed.process.pid]
    assert {Path(program).name for _, program in joined} == {"bwrap"}  # not yet the program itself


@needs_bwrap
async def test_descriptors_are_handed_in(cell: Cell) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"through the wall\n")
        os.close(write)
        status, text = await cell.run(f"exec /usr/bin/bash -c 'cat <&{read}'", pass_fds=[read])
    finally:
        os.close(read)
    assert status.code == 0
    assert text == "through the wall\n"


@needs_bwrap
async def test_exit_status_and_signal_come_through_and_are_noted(cell: Cell) -> None:
    assert (await cell.run("exit 9"))[0] == ExitStatus(code=9)
    assert exit_code(cell.status_file) == 9
    jailed = await cell.start(f"touch {cell.home}/runs; exec sleep 60")
    async with asyncio.timeout(10):
        while not (cell.home / "runs").exists():
            await asyncio.sleep(0.01)
    assert exit_code(cell.status_file) is None
    jailed.process.kill()
    assert await jailed.wait_exit(10) == ExitStatus(signal=signal.SIGKILL)
    assert exit_code(cell.status_file) == 128 + signal.SIGKILL


@needs_bwrap
async def test_the_keepers_death_leaves_the_program_alone_and_it_can_be_adopted(cell: Cell) -> None:
    jailed = await cell.start("sleep 60")
    refs = msgspec.json.decode(msgspec.json.encode(jailed.refs), type=JailedRefs)
    assert jailed.keeper is not None
    jailed.keeper.kill()
    await jailed.keeper.wait_exit(10)
    again = adopt(refs)
    assert again is not None
    with again:
        assert again.keeper is None
        assert again.process.alive
        again.process.kill()
        assert await again.wait_exit(10) == ExitStatus()  # nobody was there to see
    assert adopt(refs) is None


@needs_bwrap
async def test_it_outlives_its_starter_and_the_exit_status_is_still_learnt(tmp_path: Path) -> None:
    home, script = tmp_path / "home", tmp_path / "starter.py"
    home.mkdir()
    user = JailUsers().vm(7) if as_root else None
    give(home, user)
    script.write_text(
        "import asyncio, os, sys\nfrom pathlib import Path\nimport msgspec\n"
        "from mica.qemu.jail import JailSpec, JailUsers, detect\nfrom mica.qemu.jailed import start\n"
        f"base = Path({str(tmp_path)!r}); home = base / 'home'\n"
        "async def main():\n"
        f"    jail = await detect(root={as_root})\n"
        f"    spec = JailSpec(writable=(home,), user=JailUsers().vm(7) if {as_root} else None)\n"
        "    argv = ['/usr/bin/sh', '-c', f'mkfifo {home}/go; read line < {home}/go; exit 5']\n"
        "    jailed = await start(jail, argv, spec, status_file=base / 'status', output=base / 'output')\n"
        "    (base / 'refs').write_bytes(msgspec.json.encode(jailed.refs))\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    starter = subprocess.run([sys.executable, str(script)], timeout=30, check=False)
    assert starter.returncode == -signal.SIGKILL
    jailed = adopt(msgspec.json.decode((tmp_path / "refs").read_bytes(), type=JailedRefs))
    assert jailed is not None
    with jailed:
        left = find_left(tmp_path / "status", marker=str(home))
        assert left is not None
        assert left.process.ref == jailed.process.ref
        left.close()
        assert find_left(tmp_path / "status", marker="another-vm") is None
        async with asyncio.timeout(10):
            while not (home / "go").exists():
                await asyncio.sleep(0.01)
        (home / "go").write_text("now\n")
        assert await jailed.wait_exit(10) == ExitStatus(code=5)


@needs_bwrap
@pytest.mark.parametrize("cancel", [False, True])
async def test_a_failed_or_cancelled_start_leaves_nothing(cell: Cell, cancel: bool) -> None:
    seen: list[int] = []
    reached = asyncio.Event()

    async def before(pid: int) -> None:
        seen.append(pid)
        if len(seen) == 2:
            reached.set()
            if not cancel:
                raise MicaError(Code.INTERNAL, "no room")
            await asyncio.Event().wait()

    task = asyncio.ensure_future(cell.start(f"touch {cell.home}/ran", before=before))
    await reached.wait()
    if cancel:
        task.cancel()
    with pytest.raises((MicaError, asyncio.CancelledError)):
        await task
    assert len(seen) == 2
    for pid in seen:
        ref = reference(pid)
        assert ref is None or find(ref) is None
    assert not (cell.home / "ran").exists()


@needs_bwrap
async def test_a_start_has_a_deadline(cell: Cell) -> None:
    async def before(pid: int) -> None:
        await asyncio.Event().wait()

    with pytest.raises(MicaError) as caught:
        await cell.start("true", before=before, timeout_s=0.2)
    assert caught.value.code is Code.TIMEOUT


@needs_bwrap
@pytest.mark.parametrize("when", ["spawned", "told"])
async def test_a_starter_killed_in_the_middle_leaves_it_held_and_findable(tmp_path: Path, when: str) -> None:
    home, script = tmp_path / "home", tmp_path / "starter.py"
    home.mkdir()
    script.write_text(
        "import asyncio, os\nfrom pathlib import Path\n"
        "from mica.qemu import jailed\nfrom mica.qemu.jail import JailSpec, JailUsers, detect\n"
        f"base = Path({str(tmp_path)!r})\n"
        "async def before(pid): os.kill(os.getpid(), 9)\n"
        "def told(_, keeper, *__):\n"
        "    os.kill(keeper.pid, 19); print(keeper.pid, flush=True); os.kill(os.getpid(), 9)\n"
        f"if {when == 'spawned'}: jailed._told = told\n"
        "async def main():\n"
        f"    jail = await detect(root={as_root})\n"
        f"    spec = JailSpec(writable=(base / 'home',), user=JailUsers().vm(7) if {as_root} else None)\n"
        "    files = {'status_file': base / 'status', 'output': base / 'output'}\n"
        "    await jailed.start(jail, ['/usr/bin/touch', '/tmp/x'], spec, **files, before=before)\n"
        "asyncio.run(main())\n"
    )
    starter = subprocess.run([sys.executable, str(script)], timeout=30, check=False, stdout=subprocess.PIPE)
    assert starter.returncode == -signal.SIGKILL
    if when == "spawned":  # bubblewrap goes on without its starter until it waits to be let go
        os.kill(int(starter.stdout), signal.SIGCONT)
    async with asyncio.timeout(10):
        while (left := find_left(tmp_path / "status", marker=str(home))) is None:
            await asyncio.sleep(0.01)
    with left:
        assert Path(os.readlink(f"/proc/{left.process.pid}/exe")).name == "bwrap"  # it never came to run
        left.process.kill()
        await left.wait_exit(10)


@needs_bwrap
@pytest.mark.root
@needs_root
async def test_two_vms_cannot_touch_each_other_even_by_the_same_path(jail: Jail, tmp_path: Path) -> None:
    first, second = Cell(jail, tmp_path, 1), Cell(jail, tmp_path, 2)
    (first.home / "disk").write_text("data")
    give(first.home, first.user)
    # Even if a mistake let the second see the first's directory, the user id stops it.
    status, text = await second.run(f"cat {first.home}/disk; ls {first.home}", JailSpec(readable=(first.home,)))
    assert status.code != 0
    assert text.count("Permission denied") == 2


@needs_bwrap
@pytest.mark.root
@needs_root
def test_an_ordinary_user_gets_a_jail_too(tmp_path: Path) -> None:
    """In a process of its own that gives up root for good: user namespaces are refused to some hosts' users."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    os.chown(tmp_path, 65534, 65534)
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(directory.stat().st_mode | 0o011)
    script = (
        "import asyncio, encodings.ascii, os\nfrom pathlib import Path\n"
        "import mica.qemu.jailed as jailed, mica.qemu.jail as jail\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        f"base = Path({str(tmp_path)!r})\n"
        "async def main():\n"
        "    try:\n        kind = await jail.detect(root=False)\n"
        "    except jail.MicaError as error:\n        print('REFUSED', error, flush=True); return\n"
        "    spec = jail.JailSpec(writable=(base / 'home',))\n"
        "    look = f'cat /proc/self/status; touch {base}/home/x; ls {base}; ls /proc | grep -c ^[0-9]'\n"
        "    argv = ['/usr/bin/sh', '-c', look]\n"
        "    one = await jailed.start(kind, argv, spec, status_file=base / 'status', output=base / 'output')\n"
        "    print(await one.wait_exit(10), kind.kind, kind.reduced, flush=True)\n"
        "asyncio.run(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    if "REFUSED" in result.stdout:
        assert "sysctl" in result.stdout or "root" in result.stdout  # the way out is told
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stderr
    assert "exit status 0 user" in result.stdout
    text = (tmp_path / "output").read_text()
    assert "CapEff:\t0000000000000000" in text
    assert "NoNewPrivs:\t1" in text
    assert text.splitlines()[-2] == "home"
    assert (home / "x").stat().st_uid == 65534


async def test_switching_it_off_is_explicit_named_and_never_for_root() -> None:
    with pytest.raises(MicaError) as caught:
        await detect(root=True, off=True)
    assert caught.value.code is Code.FORBIDDEN
    jail = await detect(root=False, off=True)
    assert jail.kind is JailKind.OFF
    assert "without a jail" in jail.reduced[0]
    assert jail.wrap(["/usr/bin/true"], JailSpec())[1:] == ["--no-new-privs", "--inh-caps=-all", "--", "/usr/bin/true"]


async def test_off_still_tracks_limits_and_exit_status(tmp_path: Path) -> None:
    cell = Cell(await detect(root=False, off=True), tmp_path)
    status, text = await cell.run(
        "ulimit -n; grep NoNewPrivs /proc/self/status; exit 4", JailSpec(limits=ResourceLimits(open_files=111))
    )
    assert status == ExitStatus(code=4)
    assert text.split() == ["111", "NoNewPrivs:", "1"]
    for jailed in cell.running:
        jailed.close()


def test_user_ids_are_a_pure_function_of_the_slot_and_never_shared() -> None:
    users = JailUsers()
    everyone = [f(slot).uid for slot in (0, 1, SLOTS - 1) for f in (users.vm, users.network)]
    assert len(set(everyone)) == 6
    assert min(everyone) == FIRST_UID
    assert max(everyone) < 0x7FFE_0000
    assert users.vm(3) == JailUsers().vm(3) == JailUser(FIRST_UID + 3, FIRST_UID + 3)
    assert JailUsers(first=1_000_000).vm(1).uid == 1_000_001
    for slot in (-1, SLOTS):
        with pytest.raises(MicaError):
            users.vm(slot)


def test_the_argument_vector_holds_the_rules() -> None:
    jail = Jail(kind=JailKind.ROOT, bwrap="/usr/bin/bwrap", setpriv="/usr/bin/setpriv")
    spec = JailSpec(writable=(Path("/a"),), readable=(Path("/b"),), user=JailUser(7000, 7001))
    argv = jail.wrap(["/usr/bin/qemu", "-S"], spec, JailFds(info=3, block=4, status=5))
    assert argv[argv.index("--bind") :][:3] == ["--bind", "/a", "/a"]
    assert "--die-with-parent" not in argv
    assert "--share-net" not in argv
    inside = argv[argv.index("--") + 1 :]
    assert inside[:3] == ["/usr/bin/setpriv", "--reuid=7000", "--regid=7001"]
    assert inside[-3:] == ["--", "/usr/bin/qemu", "-S"]
    user = Jail(kind=JailKind.USER, bwrap="/usr/bin/bwrap", disable_userns=True).wrap(["/usr/bin/qemu"], spec)
    assert "--unshare-user" in user
    assert "--disable-userns" in user
    assert "--cap-add" not in user
    assert "/usr/bin/setpriv" not in user
    for wrong in (None, JailUser(0, 7), JailUser(7, 0)):
        with pytest.raises(MicaError):
            jail.wrap(["/usr/bin/qemu"], msgspec.structs.replace(spec, user=wrong))


@pytest.mark.root
@needs_root
def test_devices_bring_their_group_or_a_word_how_to_open_them(tmp_path: Path) -> None:
    jail = Jail(kind=JailKind.ROOT, bwrap="bwrap", setpriv="setpriv")
    device = tmp_path / "kvm"
    device.touch()

    def argv(mode: int, gid: int) -> list[str]:
        device.chmod(mode)
        os.chown(device, 0, gid)
        return jail.wrap(["/q"], JailSpec(devices=(device,), user=JailUser(7, 7)))

    assert "--groups=108" in argv(0o660, 108)
    assert "--clear-groups" in argv(0o666, 108)
    with pytest.raises(MicaError) as caught:
        argv(0o600, 0)
    assert caught.value.code is Code.HOST_LACKS
    assert "chmod" in caught.value.hint


def test_handing_over_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("not yours")
    outside.chmod(0o644)
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    (home / "deep" / "file").write_text("x")
    (home / "link").symlink_to(outside)
    user = JailUser(7777, 7777) if as_root else None
    give(home, user)
    assert outside.stat().st_mode & 0o777 == 0o644
    assert outside.stat().st_uid == os.geteuid()
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "deep" / "file").stat().st_mode & 0o777 == 0o600
    if user is not None:
        assert (home / "deep" / "file").stat().st_uid == user.uid
        assert (home / "link").lstat().st_uid == user.uid
    with pytest.raises(OSError, match="symbolic"):
        give(home / "link", user)


def test_the_way_out_depends_on_why_it_is_refused(tmp_path: Path) -> None:
    for directory in ("user", "kernel"):
        (tmp_path / directory).mkdir()
    assert "as root" in advice(False, tmp_path)
    (tmp_path / "kernel/apparmor_restrict_unprivileged_userns").write_text("1\n")
    assert "apparmor_restrict_unprivileged_userns=0" in advice(False, tmp_path)
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("0\n")
    assert "unprivileged_userns_clone=1" in advice(False, tmp_path)
    (tmp_path / "user/max_user_namespaces").write_text("0\n")
    assert "max_user_namespaces" in advice(False, tmp_path)
    assert "container" in advice(True, tmp_path)


@needs_bwrap
async def test_a_file_that_is_not_there_ends_it_with_a_word(cell: Cell) -> None:
    async def told() -> str:
        """The sooner bubblewrap notices, the earlier it tells: before the program is held, or by its end."""
        try:
            status, text = await cell.run("true", JailSpec(readable=(cell.base / "missing",)))
        except MicaError as error:
            return f"{error.code}: {error.message}"
        return f"status {status.code}: {text}"

    for _ in range(10):
        words = await told()
        assert words.startswith((f"{Code.COMMAND_FAILED}:", "status 1:"))
        assert "missing: No such file" in words
