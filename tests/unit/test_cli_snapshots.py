"""``mica snapshot`` and ``mica fork``, against a daemon's API over an engine in memory."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.cli.complete import names_from
from mica.cli.events import describe as describe_event
from mica.cli.snapshot_show import tree
from mica.cli.vm_show import describe
from mica.cli.world import World
from mica.engine.operations.snapshot_create import Take
from mica.model.errors import TABLE, Code
from mica.model.identity import IdentityItem, Trait
from mica.model.paths import api_socket, runtime_dir
from mica.model.snapshot import Snapshot, SnapshotState
from mica.model.units import MIB, Bytes
from mica.model.views import Event, SnapshotRestore, SnapshotView, VmFork
from mica.model.vm import VmSpec, VmState
from tests.unit.client_fixtures import Ended, Served, mica, served

replace = msgspec.structs.replace


@pytest.fixture
def api() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
def run(api: Served) -> Any:
    def call(*argv: str, **options: Any) -> Ended:
        return mica(*argv, url=api.url, **options)

    call("vm", "create", "--name", "web", "--start")
    return call


def test_a_snapshot_through_its_life(api: Served, run: Any) -> None:
    assert run("snapshot", "list", "web").err == "mica: no snapshots yet; take one with: mica snapshot create web\n"
    made = run("snapshot", "create", "web", "clean", "--description", "before the upgrade")
    assert made.out == "clean of web is complete, 50 MiB, with memory, web stood still for 90 ms\n"
    assert run("snapshot", "create", "web", "clean").status == TABLE[Code.EXISTS].exit_status
    shown = run("snapshot", "show", "web", "clean").out
    for text in ("name:", "clean", "web goes on from here", "90 ms", "before the upgrade", "QEMU build 7.2.0"):
        assert text in shown
    assert run("snapshot", "rename", "web", "clean", "fresh").out == "clean is fresh now\n"
    assert run("snapshot", "describe", "web", "fresh", "as installed").out == "fresh is described\n"
    assert run("snapshot", "protect", "web", "fresh").out == "fresh is protected\n"
    refused = run("snapshot", "delete", "web", "fresh")
    assert (refused.status, refused.out) == (TABLE[Code.PROTECTED].exit_status, "")
    assert run("snapshot", "protect", "web", "fresh", "--off").out == "fresh is not protected any more\n"
    assert run("snapshot", "verify", "web", "fresh").out == "web/fresh is whole\n"
    kept = json.loads(run("snapshot", "show", "web", "fresh", "--json").out)["snapshot"]
    assert (kept["name"], kept["description"], kept["protected"]) == ("fresh", "as installed", False)
    assert run("snapshot", "delete", "web", kept["id"][:8]).out == "web/fresh is deleted\n"
    assert api.engine.shelf == {}


def test_what_create_sends(api: Served, run: Any) -> None:
    ended = run("snapshot", "create", "web", "--no-memory", "--quiesce", "--description", "d")
    assert ended.out == "snapshot-1 of web is complete, 50 MiB, without memory\n"
    verb, target, take, *_ = api.engine.submitted[-1]
    assert (verb, target) == ("snapshot.create", "web")
    assert take == Take(memory=False, quiesce=True, description="d")


def test_several_snapshots_at_once_report_each(run: Any) -> None:
    for name in ("one", "two"):
        run("snapshot", "create", "web", name)
    ended = run("snapshot", "delete", "web", "one", "nothing", "two")
    assert ended.out.splitlines() == ["web/one is deleted", "web/two is deleted"]
    assert ended.status == TABLE[Code.NOT_FOUND].exit_status


def test_damage_is_an_error_of_verify_and_a_state_in_lists(api: Served, run: Any) -> None:
    run("snapshot", "create", "web", "clean")
    ((id_, view),) = api.engine.shelf.items()
    api.engine.shelf[id_] = replace(view, damaged=("disk root: its checksum is another",))
    ended = run("snapshot", "verify", "web", "clean")
    assert (ended.status, ended.out) == (TABLE[Code.CORRUPT].exit_status, "")
    assert "snapshot clean of web is damaged: disk root: its checksum is another" in ended.err
    assert run("snapshot", "list", "web").out.splitlines()[1].split()[-2:] == ["damaged", "-"]
    assert "disk root: its checksum is another" in run("snapshot", "show", "web", "clean").out


def test_restore_keeps_what_was_unless_told_otherwise(api: Served, run: Any) -> None:
    run("snapshot", "create", "web", "clean")
    first = run("snapshot", "restore", "web", "clean").out.splitlines()
    assert first[0].startswith("web is running, as it was ")
    assert first[0].endswith(" ago at clean")
    assert first[1] == "what it was before is before-restore-1: mica snapshot restore web before-restore-1"
    second = run("snapshot", "restore", "web", "clean", "--no-keep", "--no-memory", "--overcommit")
    assert second.out.startswith("web is stopped, as it was ")
    assert "before is" not in second.out
    assert api.engine.asked[-1][3] == SnapshotRestore(keep=False, memory=False, overcommit=True)
    assert run("snapshot", "restore", "web", "nothing").status == TABLE[Code.NOT_FOUND].exit_status


def test_forks_are_shown_with_their_ports_and_times(api: Served, run: Any) -> None:
    ended = run("fork", "web", "--count", "2", "--name", "w")
    lines = ended.out.splitlines()
    assert lines[0] == "w-1 is running at 10.0.2.15 after 0.28 s"
    assert lines[1].startswith("  127.0.0.1:40001 → 80/tcp")
    assert lines[2].startswith("w-2 is running")
    told = json.loads(run("fork", "web", "--name", "other", "--overcommit", "--json").out)
    assert [(copy["vm"]["name"], round(copy["took_s"], 2)) for copy in told["copies"]] == [("other", 0.28)]
    assert api.engine.asked[-1][3] == VmFork(name="other", overcommit=True)
    shown = run("vm", "show", "other").out
    assert "fork of:" in shown
    assert "goes on from" not in shown
    # The moments at which they began are nobody's business until asked for.
    assert "no snapshots yet" in run("snapshot", "list", "web").err
    assert "a fork began here" in run("snapshot", "list", "web", "--all").out


def test_a_fork_of_a_snapshot(api: Served, run: Any) -> None:
    run("snapshot", "create", "web", "clean")
    run("vm", "stop", "web")
    assert run("fork", "web").status == TABLE[Code.STATE_CONFLICT].exit_status
    assert run("fork", "web", "--snapshot", "clean").out.startswith("web-fork-1 is running")
    assert "1 fork" in run("snapshot", "list", "web").out
    assert "goes on from clean of web" in run("vm", "show", "web-fork-1").out
    assert run("fork", "web", "--count", "0").status == TABLE[Code.INVALID].exit_status


def test_copies_that_run_are_told_beside_those_that_do_not(run: Any) -> None:
    run("vm", "create", "--name", "barren", "--start")
    ended = run("fork", "barren", "--count", "2")
    assert ended.status == TABLE[Code.INSUFFICIENT_MEMORY].exit_status
    assert "needs 256 MiB" in ended.err


# ── the tree ──────────────────────────────────────────────────────────────────────────────────────────────────────


def view(name: str, parent: str = "", *, at: float = 0.0, **more: Any) -> SnapshotView:
    snapshot = Snapshot(
        id=name,
        vm_id="vm",
        vm_name="web",
        name=name,
        spec=VmSpec(),
        created_at=at,
        created_by="root",
        parent=parent,
        state=SnapshotState.COMPLETE,
    )
    rest = {"size": Bytes(MIB), "memory": True, "current": False, "complete": True, **more}
    return SnapshotView(snapshot=snapshot, generation=1, **rest)


def drawn(*views: SnapshotView) -> list[str]:
    return [f"{node.branch}{node.view.snapshot.name}" for node in tree(views)]


def test_what_follows_alone_stays_in_its_column_and_what_divides_grows_to_the_right() -> None:
    views = [view("a"), view("b", "a"), view("c", "b", at=1), view("d", "c"), view("e", "b", at=2)]
    assert drawn(*views) == ["a", "b", "├─ c", "│  d", "└─ e"]
    assert drawn(*reversed(views)) == drawn(*views)


def test_several_beginnings_divide_too() -> None:
    assert drawn(view("a"), view("b", "a"), view("c", "gone", at=1)) == ["├─ a", "│  b", "└─ c"]


def test_a_thousand_in_a_row_are_a_column() -> None:
    views = [view(f"s{n}", f"s{n - 1}" if n else "", at=n) for n in range(1000)]
    lines = drawn(*views)
    assert (len(lines), max(map(len, lines))) == (1000, 4)


def test_the_snapshots_of_all_vms_are_listed_by_vm(run: Any) -> None:
    run("vm", "create", "--name", "api", "--start")
    run("snapshot", "create", "web", "clean")
    run("snapshot", "create", "web", "later")
    run("snapshot", "create", "api", "first")
    lines = run("snapshot", "list").out.splitlines()
    assert [line.split()[0] for line in lines if line] == ["api", "NAME", "first", "web", "NAME", "clean", "later"]
    assert lines[1].split() == ["NAME", "SIZE", "AGE", "MEMORY", "STATE", "ABOUT"]
    assert "later ← now" in lines[-1]
    assert [v["snapshot"]["name"] for v in json.loads(run("snapshot", "list", "--json").out)] == [
        *("clean", "later", "first")
    ]


# ── elsewhere ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_show_tells_what_a_copy_has_of_its_own(api: Served, run: Any) -> None:
    (vm,) = api.engine.machines.values()
    identity = (
        IdentityItem(Trait.RANDOM, True),
        IdentityItem(Trait.MAC, True),
        IdentityItem(Trait.HOST_KEYS, False, "there is no ssh-keygen"),
    )
    # Its control group is charged for memory too that is there for all of its relatives.
    sizes = {"memory": 300 * MIB, "own": 36 * MIB, "shared": 256 * MIB, "promised": 164 * MIB}
    usage = replace(vm.usage, **{name: Bytes(size) for name, size in sizes.items()})
    text = describe(replace(vm, identity=identity, forked_from="db", snapshot="1234", usage=usage), vm.created_at)
    assert "random, mac" in text
    assert "ssh-host-keys: there is no ssh-keygen" in text
    assert "goes on from 1234" in text
    assert "36 MiB of memory, 256 MiB shared with its relatives, 164 MiB of memory promised" in text


def test_events_of_snapshots_are_lines(run: Any) -> None:
    one = msgspec.to_builtins(view("clean"))
    assert describe_event(Event(revision=3, kind="snapshot", id="x", object=one)).endswith(
        "snapshot  clean of web complete"
    )
    assert describe_event(Event(revision=3, kind="snapshot", id="x")).endswith("x is gone")


def test_a_stopped_vm_has_no_memory_to_keep(run: Any) -> None:
    run("vm", "stop", "web")
    assert run("snapshot", "create", "web").out == "snapshot-1 of web is complete, 50 MiB, without memory\n"
    assert run("snapshot", "restore", "web", "snapshot-1").out.splitlines()[0].startswith(f"web is {VmState.STOPPED}")


def test_names_of_snapshots_complete(api: Served, run: Any, tmp_path: Path) -> None:
    run("vm", "create", "--name", "api", "--start")
    run("snapshot", "create", "web", "clean")
    run("snapshot", "create", "api", "first")
    # A directory with a short name, as sockets need.
    with tempfile.TemporaryDirectory(prefix="mica-", dir="/tmp") as base:
        world = World({"XDG_RUNTIME_DIR": base}, 1, None, io.StringIO(), io.StringIO())
        socket = api_socket(runtime_dir(tmp_path, world.environ, 1))
        socket.parent.mkdir(parents=True)
        socket.symlink_to(api.socket)
        assert names_from("vms/web/snapshots", world, str(tmp_path)) == ["clean"]
        assert names_from("snapshots", world, str(tmp_path)) == ["clean", "first"]
        assert names_from("vms/nobody/snapshots", world, str(tmp_path)) == []
        assert sorted(names_from("vms", world, str(tmp_path))) == ["api", "web"]


def test_a_stopped_vm_is_cloned_and_a_running_one_is_refused(run: Any) -> None:
    run("vm", "create", "--name", "old")
    assert run("clone", "old").out == "old-clone-1 is stopped, a linked copy of old\n"
    assert run("clone", "old", "--full", "--name", "whole").out == "whole is stopped, a full copy of old\n"
    assert "leave one of" in run("clone", "old", "--full", "--linked").err
    run("vm", "start", "old")
    refused = run("clone", "old")
    assert (refused.status, "fork it" in refused.err) == (TABLE[Code.STATE_CONFLICT].exit_status, True)


def test_snapshots_are_scheduled_listed_and_unscheduled(run: Any) -> None:
    assert run("snapshot", "schedules").out == "no schedules; make one with: mica snapshot schedule VM\n"
    run("vm", "create", "--name", "old")
    made = run("snapshot", "schedule", "old", "--every", "2h", "--keep", "24h,7d")
    assert made.out == "old: every 2h, keeping 24h,7d\n"
    run("snapshot", "schedule", "--label", "tier=web", "--no-memory")
    head, first, second = run("snapshot", "schedules").out.splitlines()
    assert head.split() == ["ID", "OF", "EVERY", "KEEPS", "MEMORY", "NEXT", "VMS", "SNAPSHOTS"]
    assert first.split()[1:5] == ["old", "2h", "24h,7d", "yes"]
    assert second.split()[1:5] == ["tier=web", "1h", "24h,7d,4w", "no"]
    for wrong in (("old", "--keep", "many"), ("old", "--every", "1s"), ("old", "--label", "x"), ()):
        assert run("snapshot", "schedule", *wrong).status == TABLE[Code.INVALID].exit_status
    assert run("snapshot", "unschedule", first.split()[0]).out == "no more snapshots of old are taken by themselves\n"
    assert len(run("snapshot", "schedules").out.splitlines()) == 2
