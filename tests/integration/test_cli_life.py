"""The same life with the ``mica`` command, as a user types it: words, tables, JSON, exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mica.model.errors import TABLE, Code
from mica.model.vm import VmState
from tests.integration.conftest import create
from tests.integration.world import World, new_world, wait_for

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def cli_world() -> Iterator[World]:
    """No daemon runs yet: the first command starts it."""
    with new_world(start=False) as made:
        try:
            yield made
        finally:
            made.cli("daemon", "stop")


def good(world: World, *words: str) -> str:
    done = world.cli(*words)
    assert done.returncode == 0, f"{words}: {done.returncode} {done.stderr}"
    return done.stdout


def data(world: World, *words: str) -> Any:
    return json.loads(good(world, *words, "--json"))


def bad(world: World, code: Code, *words: str) -> str:
    done = world.cli(*words)
    assert done.returncode == TABLE[code].exit_status, f"{words}: {done.returncode} {done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stderr


def test_commands_at_once_start_one_daemon(cli_world: World) -> None:
    argv = [sys.executable, "-P", "-m", "mica", "image", "list"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [subprocess.Popen(argv, env=cli_world.environ, cwd="/", **pipes) for _ in range(3)]
    said = [command.communicate(timeout=90) for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], said
    assert len([err for _, err in said if "starting a daemon" in err]) == 1
    daemons = [words for words in cli_world.processes().values() if "mica.daemon" in words]
    assert len(daemons) == 1
    wait_for("the image", lambda: "micro" in good(cli_world, "image", "list"))


def test_a_whole_life(cli_world: World) -> None:
    wait_for("the image", lambda: "micro" in good(cli_world, "image", "list"))
    good(cli_world, "vm", "create", "micro", "--name", "web", "--memory", "128M", "--label", "tier=front")
    (row,) = [line for line in good(cli_world, "vm", "list").splitlines() if "web" in line]
    assert "stopped" in row
    assert "there is a VM web already" in bad(cli_world, Code.EXISTS, "vm", "create", "micro", "--name", "web")
    assert "is not a DNS label" in bad(cli_world, Code.INVALID, "vm", "create", "micro", "--name", "W B")
    assert "there are: micro" in bad(cli_world, Code.NOT_FOUND, "run", "plan9")
    good(cli_world, "vm", "start", "web")
    shown = data(cli_world, "vm", "show", "web")
    assert shown["observed"]["state"] == "running"
    assert shown["labels"] == {"tier": "front"}
    assert os.path.exists(f"/proc/{shown['process']['pid']}")
    text = good(cli_world, "vm", "show", "web")
    for words in ("running", "tier", shown["nics"][0]["address"], str(shown["process"]["pid"])):
        assert words in text
    if shown["accelerator"] == "tcg":  # the jail is the only boundary, and that is said
        assert "TCG" in text
    good(cli_world, "vm", "pause", "web")
    assert "paused" in good(cli_world, "vm", "list")
    good(cli_world, "vm", "resume", "web")
    good(cli_world, "vm", "set", "web", "--memory", "160M")
    assert data(cli_world, "vm", "show", "web")["pending"] == ["memory"]
    assert "memory" in good(cli_world, "vm", "show", "web")
    assert "stop it first" in bad(cli_world, Code.STATE_CONFLICT, "vm", "delete", "web")
    assert "forced" in good(cli_world, "vm", "stop", "web", "--force")
    operations = data(cli_world, "operation", "list")
    assert {"vm.create", "vm.start", "vm.pause", "vm.stop"} <= {o["verb"] for o in _items(operations)}
    good(cli_world, "vm", "delete", "web")
    assert "web" not in good(cli_world, "vm", "list")
    assert "web" in good(cli_world, "vm", "list", "--trash")
    good(cli_world, "vm", "restore", "web")
    good(cli_world, "vm", "delete", "web", "--purge")
    assert "web" in bad(cli_world, Code.NOT_FOUND, "vm", "show", "web")
    assert not [line for line in cli_world.leftovers() if "mica.daemon" not in line]


def _items(document: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["items"] if isinstance(document, dict) else document
    return found


def test_the_daemon_stops_and_comes_again(cli_world: World) -> None:
    good(cli_world, "vm", "create", "micro", "--name", "kept", "--memory", "96M", "--start")
    pid = data(cli_world, "vm", "show", "kept")["process"]["pid"]
    good(cli_world, "daemon", "stop")
    assert not cli_world.answers()
    assert cli_world.qemus() == [pid]
    assert data(cli_world, "vm", "show", "kept")["process"]["pid"] == pid  # this starts another daemon
    good(cli_world, "vm", "delete", "kept", "--purge", "--force")


def test_the_trash_empties_itself() -> None:
    with new_world(trash="1s") as world:

        async def throw_away() -> None:
            async with world.client() as client:
                vm = await create(client, "short-lived", disk="1M")
                await vm.delete()
                (trashed,) = await client.vms.list(trashed=True)
                assert trashed.state is VmState.TRASHED
                assert trashed.view.deleted_at is not None
                assert trashed.view.expires_at == pytest.approx(trashed.view.deleted_at + 1, abs=0.1)
                async with asyncio.timeout(30):
                    while await client.vms.list(trashed=True):
                        await asyncio.sleep(0.1)

        asyncio.run(throw_away())
        assert world.leftovers() == []
