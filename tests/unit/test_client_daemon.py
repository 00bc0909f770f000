"""Finding, starting and stopping a home's daemon. What is started here is a small program that only listens."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mica.client import daemon
from mica.client.daemon import Place
from mica.model.errors import Code, MicaError
from mica.model.paths import api_socket, runtime_dir, state_home

LISTENER = textwrap.dedent(
    """
    import os, signal, socket, sys, time
    home, path, wait = sys.argv[1], sys.argv[2], float(sys.argv[3])
    with open(home + "/started", "a") as log:
        log.write(f"{os.getpid()} {os.getsid(0)}\\n")
    time.sleep(wait)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    if os.path.exists(path):
        os.unlink(path)
    sock.bind(path)
    sock.listen()
    print("listening", flush=True)
    signal.pause()
    """
)


def quiet(_text: str) -> None:
    pass


@pytest.fixture
def place() -> Iterator[Place]:
    directory = Path(tempfile.mkdtemp(prefix="mica-"))
    home, uid = directory / "home", os.geteuid()
    home.mkdir()
    try:
        yield Place(home, directory / "run" / "x" / "api.sock", uid, uid)
    finally:
        with suppress(FileNotFoundError):
            for line in (home / "started").read_text().splitlines():
                with suppress(ProcessLookupError):
                    os.kill(int(line.split()[0]), signal.SIGKILL)
                daemon_ended(int(line.split()[0]))
        shutil.rmtree(directory)


def daemon_ended(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def listener(place: Place, wait_s: float = 0.0) -> list[str]:
    return [sys.executable, "-c", LISTENER, str(place.home), str(place.socket), str(wait_s)]


def started(place: Place) -> list[list[str]]:
    return [line.split() for line in (place.home / "started").read_text().splitlines()]


async def test_it_is_started_once_even_when_many_race(place: Place) -> None:
    said: list[str] = []
    pids = await asyncio.gather(
        *(daemon.ensure(place, os.environ, announce=said.append, argv=listener(place, 0.3)) for _ in range(5))
    )
    ((pid, session),) = started(place)
    assert [p for p in pids if p is not None] == [int(pid)]
    assert session == pid != str(os.getsid(0))  # a session of its own: Ctrl-C here does not reach it
    assert len([line for line in said if "starting a daemon" in line]) == 1
    assert place.log.read_text() == "listening\n"
    assert await daemon.listener_pid(place) == int(pid)


async def test_one_that_dies_tells_its_last_words(place: Place) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('no luck today')"]
    with pytest.raises(MicaError) as caught:
        await daemon.ensure(place, os.environ, announce=quiet, argv=argv)
    assert caught.value.code is Code.DAEMON_UNREACHABLE
    assert "status 1" in caught.value.message
    assert "no luck today" in caught.value.hint
    assert str(place.log) in caught.value.hint


async def test_one_that_never_listens_is_not_waited_for_forever(place: Place) -> None:
    with pytest.raises(MicaError, match="did not answer within 0 s"):
        await daemon.ensure(place, os.environ, announce=quiet, timeout_s=0.3, argv=listener(place, 60))


async def test_one_that_finds_the_home_taken_leaves_the_wait_to_the_owner(place: Place) -> None:
    """Somebody else's daemon holds the home and is about to listen; ours ends with the status that says so."""
    other = await asyncio.create_subprocess_exec(*listener(place, 0.5))
    try:
        argv = [sys.executable, "-c", "import sys; sys.exit(23)"]
        await daemon.ensure(place, os.environ, announce=quiet, argv=argv)
        assert await daemon.listener_pid(place) == other.pid
    finally:
        other.kill()
        await other.wait()


async def test_a_dead_daemons_socket_is_no_daemon(place: Place) -> None:
    await daemon.ensure(place, os.environ, announce=quiet, argv=listener(place))
    ((pid, _),) = started(place)
    os.kill(int(pid), signal.SIGKILL)
    daemon_ended(int(pid))
    assert place.socket.exists()
    assert not await daemon.answers(place)
    with pytest.raises(MicaError) as caught:
        await daemon.listener_pid(place)
    assert caught.value.code is Code.DAEMON_UNREACHABLE
    assert await daemon.ensure(place, os.environ, announce=quiet, argv=listener(place)) is not None


async def test_stop_waits_until_it_has_ended(place: Place) -> None:
    pid = await daemon.ensure(place, os.environ, announce=quiet, argv=listener(place))
    assert await daemon.stop(place) == pid
    assert pid is not None
    assert daemon.reap(pid) == -signal.SIGTERM
    with pytest.raises(MicaError) as caught:
        await daemon.stop(place)
    assert caught.value.code is Code.DAEMON_UNREACHABLE


async def test_stop_gives_up_on_one_that_does_not_listen(place: Place) -> None:
    argv = listener(place)
    argv[2] = argv[2].replace(
        "signal.pause()", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(flush=True)\nwhile 1: time.sleep(9)"
    )
    pid = await daemon.ensure(place, os.environ, announce=quiet, argv=argv)
    while place.log.read_text().count("\n") < 2:
        await asyncio.sleep(0.01)
    with pytest.raises(MicaError) as caught:
        await daemon.stop(place, timeout_s=0.2)
    assert caught.value.code is Code.TIMEOUT
    assert f"kill -9 {pid}" in caught.value.hint


async def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    uid = os.geteuid()
    with pytest.raises(MicaError) as caught:
        await daemon.ensure(
            Place(tmp_path / "file" / "home", tmp_path / "s", uid, uid), os.environ, announce=quiet, argv=["none"]
        )
    assert caught.value.code is Code.FORBIDDEN
    assert "MICA_HOME" in caught.value.hint


async def test_somebody_elses_home_is_not_started_in(tmp_path: Path) -> None:
    with pytest.raises(MicaError) as caught:
        await daemon.ensure(Place(tmp_path, tmp_path / "s", os.geteuid() + 1, os.geteuid()), {}, announce=quiet)
    assert caught.value.code is Code.DAEMON_UNREACHABLE
    assert not list(tmp_path.iterdir())


def test_a_long_log_is_put_aside(place: Place) -> None:
    place.log.write_bytes(b"x" * (8 * 1024**2 + 1))
    asyncio.run(_start(place))
    assert place.log.with_name("daemon.log.1").stat().st_size > 8 * 1024**2
    assert place.log.read_text() == "listening\n"


async def _start(place: Place) -> None:
    await daemon.ensure(place, os.environ, announce=quiet, argv=listener(place))


def test_a_runtime_directory_that_others_may_change_is_refused(tmp_path: Path) -> None:
    runtime, uid = tmp_path / "mica-1" / "12345678", os.geteuid()
    daemon.check_runtime_dir(runtime, uid)  # nothing there: nobody to trust
    runtime.mkdir(parents=True, mode=0o700)
    runtime.parent.chmod(0o777)
    with pytest.raises(MicaError, match="mode 0777"):
        daemon.check_runtime_dir(runtime, uid)
    runtime.parent.chmod(0o700)
    daemon.check_runtime_dir(runtime, uid)
    with pytest.raises(MicaError) as caught:
        daemon.check_runtime_dir(runtime, uid + 1)
    assert caught.value.code is Code.FORBIDDEN
    runtime.rmdir()
    runtime.symlink_to(tmp_path)
    with pytest.raises(MicaError, match="is not a directory"):
        daemon.check_runtime_dir(runtime, uid)


def test_signing_out_is_warned_of_where_it_ends_the_daemon(tmp_path: Path) -> None:
    place = Place(tmp_path, Path("/run/user/1/mica/1/api.sock"), 1, 1)
    assert daemon.logout_note(place, tmp_path) == ""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert "enable-linger" in daemon.logout_note(place, tmp_path)
    linger = tmp_path / "var/lib/systemd/linger"
    linger.mkdir(parents=True)
    (linger / "daemon").touch()
    assert daemon.logout_note(place, tmp_path) == ""


def test_where_things_are(tmp_path: Path) -> None:
    assert state_home({}, 0) == Path("/var/lib/mica")
    assert state_home({"MICA_HOME": "/srv/m"}, 0) == Path("/srv/m")
    assert state_home({"HOME": "/home/u"}, 1000) == Path("/home/u/.local/state/mica")
    assert state_home({"HOME": "/home/u", "XDG_STATE_HOME": "/s"}, 1000) == Path("/s/mica")
    assert state_home({"HOME": "/home/u", "XDG_STATE_HOME": "relative"}, 1000) == Path("/home/u/.local/state/mica")
    assert runtime_dir(tmp_path, {}, 0).parent == Path("/run/mica")
    assert runtime_dir(tmp_path, {"XDG_RUNTIME_DIR": "/run/user/1000"}, 1000).parent == Path("/run/user/1000/mica")
    assert runtime_dir(tmp_path, {"XDG_RUNTIME_DIR": "/" + "x" * 60}, 1000).parent == Path("/tmp/mica-1000")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert runtime_dir(link, {}, 0) == runtime_dir(tmp_path, {}, 0)
    assert len(str(api_socket(runtime_dir(tmp_path, {}, 1000)))) < 60


def test_another_users_home_leads_to_their_daemon(tmp_path: Path) -> None:
    uid = os.geteuid()
    assert daemon.locate(tmp_path, {"XDG_RUNTIME_DIR": "/run/user/7"}, uid).owner == uid
    theirs = daemon.locate(tmp_path, {"XDG_RUNTIME_DIR": "/run/user/7"}, uid + 7)
    assert not theirs.ours
    if uid == 0:
        assert theirs.socket == api_socket(runtime_dir(tmp_path, {}, 0))
    else:
        assert "/run/user/7" not in str(theirs.socket)
