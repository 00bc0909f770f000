"""The command line in this process, against a daemon's API over an engine in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mica.cli.app import SECTIONS, build_app, top_help
from mica.cli.main import move_global_options
from mica.cli.reference import markdown
from mica.cli.streams import EscapeKeys
from mica.cli.text import facts, fold, table
from mica.cli.vm_log import added, harmless, last_lines
from mica.cli.vm_show import describe
from mica.model.doctor import DoctorReport, Finding, Status
from mica.model.errors import TABLE, Code, MicaError, Problem
from mica.model.operation import Operation, OperationState
from mica.model.units import Bytes
from mica.model.views import VmCreate, VmSet
from mica.model.vm import Publish
from tests.unit.client_fixtures import Ended, Served, mica, served

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
def api(server: Served) -> Served:
    """Each test begins with nothing there."""
    engine = server.engine
    for kept in (engine.machines, engine.jobs, engine.kept_images, engine.submitted, engine.serial):
        kept.clear()
    engine.fail = None
    return server


@pytest.fixture
def run(api: Served) -> Any:
    def call(*argv: str, **options: Any) -> Ended:
        return mica(*argv, url=api.url, **options)

    return call


def test_help_names_every_command() -> None:
    ended = mica("--help")
    assert ended.status == 0
    for section in SECTIONS:
        for command in section.commands:
            assert f"  {command.name} " in ended.out
    assert mica() == ended
    assert max(map(len, top_help(60).splitlines())) <= 112


def test_version() -> None:
    assert mica("--version").out == "mica 0.1.0\n"


def commands(app: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name in app:
        if not name.startswith("-"):
            yield f"{path} {name}", app[name]
            yield from commands(app[name], f"{path} {name}")


def test_the_tree_and_the_commands_say_the_same() -> None:
    """The tree says in one line what a command is for, so that nothing is imported for it."""
    for path, app in commands(build_app(), "mica"):
        if app.default_command is not None and path.count(" ") > 1:
            own = app.default_command.__doc__.split("\n")[0]
            assert own.startswith(app.help.rstrip(".")), path


def test_every_option_of_every_command_is_explained() -> None:
    for path, app in commands(build_app(), "mica"):
        if app.default_command is not None:
            for argument in app.assemble_argument_collection(parse_docstring=True):
                if argument.show and argument.parse:
                    assert argument.parameter.help, f"{path} {argument.names}"


def test_the_reference_is_what_the_commands_say() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
    assert page.read_text(encoding="utf-8") == markdown(), "python -m mica.cli.reference > docs/reference/cli.md"


def test_a_vm_through_its_life(run: Any) -> None:
    assert run("vm", "list").err == "mica: no VMs yet; make one with: mica run micro\n"
    assert run("vm", "create", "--name", "web", "--memory", "512M", "--cpus", "2").out == "web is stopped\n"
    assert run("vm", "start", "web").out == "web is running\n"
    listed = run("vm", "list").out.splitlines()
    assert listed[0].split() == [
        "NAME",
        "STATE",
        "IMAGE",
        "VCPUS",
        "MEMORY",
        "CPU",
        "USED",
        "PROMISED",
        "ADDRESS",
        "UP",
    ]
    assert listed[1].split()[:6] == ["web", "running", "-", "2", "512", "MiB"]
    assert "\x1b" not in "".join(listed)
    assert run("vm", "pause", "web").out == "web is paused\n"
    assert run("vm", "resume", "web").out == "web is running\n"
    assert run("vm", "suspend", "web").out == "web is suspended\n"
    refused = run("vm", "stop", "web")
    assert (refused.status, "--discard" in refused.err) == (TABLE[Code.STATE_CONFLICT].exit_status, True)
    assert run("vm", "stop", "--discard", "web").out == "web is stopped\n"
    assert run("vm", "start", "web").out == "web is running\n"
    assert run("vm", "set", "web", "--cpus", "3", "--label", "tier=web").out == "web is changed\n"
    assert [vm["name"] for vm in json.loads(run("vm", "list", "--label", "tier=web", "--json").out)] == ["web"]
    assert run("vm", "set", "web", "--unlabel", "tier", "--protected").status == 0
    refused = run("vm", "delete", "web", "--force")
    assert (refused.status, refused.out) == (TABLE[Code.PROTECTED].exit_status, "")
    assert run("vm", "set", "web", "--no-protected").status == 0
    assert run("vm", "stop", "web").out == "web is stopped\n"
    assert run("vm", "stop", "web").out == "web is stopped already\n"
    assert run("vm", "delete", "web").out == "web is trashed\n"
    assert run("vm", "list", "--trashed").out.splitlines()[1].startswith("web ")
    assert run("vm", "restore", "web", "--name", "web2").out == "web2 is stopped\n"
    assert run("vm", "delete", "web2", "--purge").out == "web2 is deleted for good\n"


def test_several_at_once_report_each(run: Any) -> None:
    for name in ("one", "two"):
        run("vm", "create", "--name", name)
    ended = run("vm", "start", "one", "nobody", "two")
    assert sorted(ended.out.splitlines()) == ["one is running", "two is running"]
    assert ended.status == TABLE[Code.NOT_FOUND].exit_status
    assert "nobody" in ended.err
    twice = run("vm", "stop", "one", "one")
    assert twice.status == TABLE[Code.INVALID].exit_status
    assert [item["target_name"] for item in json.loads(run("vm", "stop", "one", "two", "--json").out)] == ["one", "two"]


def test_what_create_sends(api: Served, run: Any) -> None:
    run("image", "build", "micro")
    ended = run(
        *(
            "vm",
            "create",
            "micro",
            "--name",
            "web",
            "--memory",
            "1.5G",
            "--disk",
            "8G",
            "-p",
            "8080:80",
            "-p",
            "53/udp",
        ),
        *("--label", "a=b", "--cpu-limit", "0.5", "--stop-timeout", "1m30s", "--network", "none", "--no-display"),
        *("--start", "--overcommit", "--description", "for the web"),
    )
    assert ended.status == 0, ended.err
    (body,) = [params for verb, _, params, *_ in api.engine.submitted if verb == "vm.create"]
    assert isinstance(body, VmCreate)
    assert (body.image, body.memory, body.disk, body.cpu_limit) == ("micro", 1536 * 1024**2, 8 * 1024**3, 0.5)
    assert body.publish == (Publish(80, 8080), Publish(53, 0, "127.0.0.1", "udp"))
    assert (body.labels, body.stop_timeout_s, body.start, body.overcommit) == ({"a": "b"}, 90.0, True, True)
    assert (body.display, body.nics[0].network) == (False, "none") if body.nics else False


def test_what_set_sends(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web")
    run("vm", "set", "web", "--boot", "disk0,net0", "--memory", "1G", "--cpu-limit", "none", "--no-autostart")
    (body,) = [params for verb, _, params, *_ in api.engine.submitted if verb == "vm.set"]
    assert body == VmSet(boot=("disk0", "net0"), memory=1024**3, cpu_limit=None, autostart=False)  # type: ignore[arg-type]
    nothing = run("vm", "set", "web")
    assert (nothing.status, "nothing to change" in nothing.err) == (TABLE[Code.INVALID].exit_status, True)


def test_publishing_is_changed_only_from_what_was_seen(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web")
    assert run("vm", "set", "web", "--publish", "8080:80").status == 0
    *_, (_, _, body, _, if_match, _) = api.engine.submitted
    assert isinstance(body, VmSet)
    assert [nic.publish for nic in body.nics] == [(Publish(80, 8080),)]  # type: ignore[union-attr]
    assert if_match is not None
    missing = run("vm", "set", "web", "--unpublish", "443")
    assert "guest port 443 of web is not published" in missing.err


def test_what_is_pending_is_said(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web")
    (view,) = api.engine.machines.values()
    waiting = replace(view, pending=("cpus", "memory"))
    text = describe(waiting, now=view.created_at)
    assert "pending:" in text
    assert "cpus, memory: from the next start on (mica vm restart web)" in text


def test_what_runs_is_told_from_what_waits(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web", "--cpus", "1", "--memory", "512M")
    (view,) = api.engine.machines.values()
    later = replace(view.spec, cpus=7, memory=Bytes(2 << 30))
    api.engine.machines[view.id] = replace(view, spec=later, running=view.spec, pending=("cpus", "memory"))
    (line,) = run("vm", "list").out.splitlines()[1:]
    assert "512 MiB" in line
    assert "2 GiB" not in line
    shown = run("vm", "show", "web").out
    assert "1 (7 from the next start on)" in shown
    assert "512 MiB (2 GiB from the next start on)" in shown


def test_show_says_what_went_wrong(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web")
    (view,) = api.engine.machines.values()
    problem = Problem(Code.QEMU_FAILED, "QEMU ended", "look at \x1b[31mits log")
    view = replace(view, observed=replace(view.observed, problem=problem, reason="it crashed"), reduced=("no cgroup",))
    text = describe(view, now=view.created_at)
    assert "QEMU ended" in text
    assert "no cgroup" in text
    assert "\x1b" not in text
    shown = run("vm", "show", "web")
    assert "name:" in shown.out
    assert json.loads(run("vm", "show", "web", "--json").out)["name"] == "web"


def test_errors_for_people_and_for_programs(run: Any) -> None:
    ended = run("vm", "show", "nobody")
    assert ended.status == TABLE[Code.NOT_FOUND].exit_status
    assert ended.out == ""
    assert ended.err.splitlines()[0].startswith("mica: ")
    assert ended.err.splitlines()[1].startswith("hint: ")
    problem = json.loads(run("vm", "show", "nobody", "--json").err)
    assert (problem["code"], problem["details"]["key"]) == ("not-found", "nobody")


@pytest.mark.parametrize("code", list(Code))
def test_every_error_has_its_exit_status(api: Served, run: Any, code: Code) -> None:
    api.engine.fail = MicaError(code, f"this is {code}", hint="do that", details={"limit": 3})
    ended = run("vm", "show", "web", "--json")
    assert ended.status == TABLE[code].exit_status
    if code is not Code.DAEMON_UNREACHABLE:
        assert json.loads(ended.err) == {
            "code": str(code),
            "message": f"this is {code}",
            "hint": "do that",
            "details": {"limit": 3},
        }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["vm", "lst"], "list"),
        (["vmm"], "vm"),
        (["vm", "create", "--memory", "1X"], "'1X' is not a size"),
        (["vm", "create", "--cpus", "many"], "many"),
        (["vm", "show"], "requires"),
        (["vm", "list", "--nope"], "--nope"),
        (["vm", "create", "--machine", "vax"], "vax"),
        (["operation", "resolve", "x", "maybe"], "maybe"),
    ],
)
def test_wrong_usage_is_status_2(run: Any, argv: list[str], said: str) -> None:
    ended = run(*argv)
    assert ended.status == 2
    assert said in ended.err
    assert ended.out == ""
    assert "--help" in ended.err or "hint" in ended.err


@pytest.mark.parametrize(
    ("argv", "see"),
    [
        (["system", "list"], "mica --help"),
        (["vm", "foo"], "mica vm --help"),
        (["template", "foo"], "mica template --help"),
        (["template", "set"], "mica template set --help"),
        (["fork"], "mica fork --help"),
    ],
)
def test_wrong_usage_names_a_help_that_there_is(run: Any, argv: list[str], see: str) -> None:
    ended = run(*argv)
    assert ended.err.endswith(f"hint: see: {see}\n")
    assert not ended.err.splitlines()[0].endswith((",", ", ", "..."))
    assert run(*see.split()[1:]).status == 0


def test_the_guests_options_are_not_ours(run: Any) -> None:
    ended = run("vm", "exec", "web", "ls", "-l")
    assert ended.status == 2
    assert "put -- before the command" in ended.err


def test_options_of_all_commands_may_come_first() -> None:
    assert move_global_options(["--json", "--home", "/h", "vm", "exec", "v", "--", "x"]) == [
        *("vm", "exec", "v", "--json", "--home", "/h", "--", "x")
    ]
    assert move_global_options(["--url=u", "vm", "list"]) == ["vm", "list", "--url=u"]
    assert move_global_options(["vm", "list", "--json"]) == ["vm", "list", "--json"]


def test_images(run: Any) -> None:
    assert "no images yet" in run("image", "list").err
    assert run("image", "build", "micro").out.startswith("micro is ready: aaaaaaaaaaaa, ")
    assert run("image", "list").out.splitlines()[1].split()[:3] == ["micro", "aaaaaaaaaaaa", "test"]
    assert "digest:" in run("image", "show", "micro").out
    assert run("image", "verify", "micro").out == "micro is whole\n"
    unknown = run("vm", "create", "windows")
    assert unknown.status == TABLE[Code.NOT_FOUND].exit_status
    assert "there are: micro" in unknown.err
    assert run("image", "delete", "micro").out == "micro is deleted\n"
    assert json.loads(run("image", "list", "--json").out) == []


def test_the_recipe_of_debian(api: Served, run: Any) -> None:
    run("image", "build", "debian", "--size", "8G", "--include", "nginx,git", "--include", "vim", "--suite", "trixie")
    recipe = api.engine.submitted[-1][2].recipe  # type: ignore[attr-defined]
    assert (recipe.size, recipe.include, recipe.suite) == (8 * 1024**3, ("nginx", "git", "vim"), "trixie")


def test_an_image_is_imported_by_its_whole_path(api: Served, run: Any) -> None:
    run("image", "import", "some/disk.vmdk", "--name", "old", "--firmware", "bios")
    recipe = api.engine.submitted[-1][2].recipe  # type: ignore[attr-defined]
    assert recipe.path == os.path.abspath("some/disk.vmdk")
    assert recipe.firmware == "bios"


def test_operations(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web")
    line = run("operation", "list").out.splitlines()[1]
    assert "vm.create" in line
    id_ = line.split()[0]
    assert "verb:" in run("operation", "show", id_).out
    assert run("operation", "wait", id_).out == "vm.create web: succeeded\n"
    late = run("operation", "cancel", id_)
    assert late.status == TABLE[Code.STATE_CONFLICT].exit_status
    assert run("operation", "list", "--active").err == "mica: no operations\n"
    (view,) = api.engine.machines.values()
    stuck = _operation(api, view.id, OperationState.STUCK)
    assert run("operation", "resolve", stuck.id, "accept").out == "vm.stop web: failed\n"
    assert json.loads(run("operation", "list", "--limit", "1", "--json").out)[0]["id"]


def _operation(api: Served, vm: str, state: OperationState) -> Operation:
    (known, *_) = api.engine.jobs.values()
    operation = replace(known, id="stuck-one", verb="vm.stop", target=f"vm/{vm}", state=state)
    api.call(api.engine._job(operation))
    return operation


def test_the_log_of_a_vm(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web", "--start")
    (view,) = api.engine.machines.values()
    api.call(api.engine.print(view.id, b"one\ntwo \x1b[31mred\x1b[0m\nthree\n"))
    assert run("vm", "log", "web", "--tail", "1").out == "three\n"
    assert "\x1b[31m" in run("vm", "log", "web").out  # into a pipe as it is
    assert run("vm", "log", "web", terminal=True).out == "one\ntwo red\nthree\n"
    assert run("vm", "log", "web", "--qemu").out == "qemu says nothing\n"
    assert "vm.create" in run("vm", "log", "web", "--operations").out
    assert json.loads(run("vm", "log", "web", "--json").out)[0] == "one"
    assert run("vm", "log", "web", "--qemu", "--console").status == TABLE[Code.INVALID].exit_status


def test_the_host(run: Any) -> None:
    assert "processors:" in run("host", "show").out
    assert json.loads(run("host", "show", "--json").out)["cpus"] == 2


def test_events_are_lines(api: Served, run: Any) -> None:
    run("vm", "create", "--name", "web")
    ended = run("events", "--since", "0", "--limit", "1", "--json")
    assert json.loads(ended.out)["object"]["name"] == "web"
    assert "vm  web stopped" in run("events", "--since", "0", "--limit", "1").out


def test_colour_only_where_it_is_wanted(run: Any) -> None:
    run("vm", "create", "--name", "web", "--start")
    assert "\x1b[32mrunning" in run("vm", "list", terminal=True).out
    assert "\x1b" not in run("vm", "list", terminal=True, environ={"NO_COLOR": "1"}).out
    assert "\x1b" not in run("vm", "list", terminal=True, environ={"TERM": "dumb"}).out
    assert "\x1b" not in run("vm", "list").out


def _report(status: Status, *, fix: tuple[str, ...]) -> Finding:
    return Finding(
        id="kvm", title="KVM", status=status, proof="ran a guest", costs="it is slow", fix=fix, fix_note="sign in again"
    )


def _doctor(api: Served, finding: Finding, after: Finding | None = None) -> None:
    engine, original = api.engine, type(api.engine).doctor

    async def doctor(*, fresh: bool = False) -> DoctorReport:
        report = await original(engine, fresh=fresh)
        return replace(report, findings=(*report.findings, after if fresh and after else finding))

    engine.doctor = doctor  # type: ignore[method-assign]


def test_doctor_says_what_is_missing_and_its_fix(api: Served, run: Any) -> None:
    ended = run("doctor")
    assert (ended.status, "✓ QEMU" in ended.out) == (0, True)
    _doctor(api, _report(Status.DEGRADED, fix=("sudo", "modprobe", "kvm amd")))
    try:
        ended = run("doctor")
        assert ended.status == 0
        assert "! KVM" in ended.out
        assert "costs: it is slow" in ended.out
        assert "sudo modprobe 'kvm amd'  (sign in again)" in ended.out
        _doctor(api, _report(Status.MISSING, fix=()))
        ended = run("doctor", "--json")
        assert ended.status == TABLE[Code.HOST_LACKS].exit_status
        assert json.loads(ended.out)["findings"][1]["status"] == "missing"
    finally:
        del api.engine.doctor


def test_doctor_fixes_what_it_may(api: Served, run: Any, tmp_path: Path) -> None:
    fix = ("touch", str(tmp_path / "fixed"))
    _doctor(api, _report(Status.DEGRADED, fix=fix), after=_report(Status.OK, fix=()))
    try:
        asked = run("doctor", "--fix")
        assert asked.status == TABLE[Code.INVALID].exit_status  # nobody there to ask
        declined = run("doctor", "--fix", terminal=True, stdin="n\n")
        assert declined.status == TABLE[Code.CANCELLED].exit_status
        assert not (tmp_path / "fixed").exists()
        done = run("doctor", "--fix", terminal=True, stdin="y\n")
        assert (done.status, (tmp_path / "fixed").exists()) == (0, True)
        assert f"running: touch {tmp_path}/fixed" in done.err
        _doctor(api, _report(Status.DEGRADED, fix=("false",)))
        failed = run("doctor", "--fix", "--yes")
        assert failed.status == TABLE[Code.COMMAND_FAILED].exit_status
        _doctor(api, _report(Status.DEGRADED, fix=("no-such-program-here",)))
        assert "cannot run no-such-program-here" in run("doctor", "--fix", "--yes").err
    finally:
        del api.engine.doctor


def test_the_token_comes_from_a_file(run: Any, tmp_path: Path) -> None:
    missing = mica("host", "show", "--url", "http://127.0.0.1:9", "--token-file", str(tmp_path / "none"))
    assert missing.status == TABLE[Code.INVALID].exit_status
    assert "cannot read the token" in missing.err
    (tmp_path / "token").write_text("secret\n")
    refused = mica("host", "show", "--url", "http://127.0.0.1:9", "--token-file", str(tmp_path / "token"))
    assert refused.status == TABLE[Code.DAEMON_UNREACHABLE].exit_status
    assert "secret" not in refused.err


def test_no_daemon_is_started_to_ask_for_one(tmp_path: Path) -> None:
    ended = mica("daemon", "status", "--home", str(tmp_path / "home"), "--json")
    assert ended.status == TABLE[Code.DAEMON_UNREACHABLE].exit_status
    assert json.loads(ended.out)["running"] is False
    assert mica("daemon", "stop", "--home", str(tmp_path / "home")).status == TABLE[Code.DAEMON_UNREACHABLE].exit_status
    assert mica("daemon", "log", "--home", str(tmp_path / "home")).status == TABLE[Code.NOT_FOUND].exit_status
    assert not (tmp_path / "home").exists()


def test_the_daemons_log(tmp_path: Path) -> None:
    (tmp_path / "daemon.log").write_text("one\ntwo\nthree\n")
    assert mica("daemon", "log", "--home", str(tmp_path), "--tail", "2").out == "two\nthree\n"


def test_escape_keys() -> None:
    keys = EscapeKeys()
    assert keys.feed(b"ls\r") == (b"ls\r", "")
    assert keys.feed(b"a\x1dq") == (b"a", "q")
    assert keys.feed(b"\x1d") == (b"", "")
    assert keys.feed(b"?b") == (b"b", "?")
    assert keys.feed(b"\x1d\x1d") == (b"\x1d", "")


def test_tables() -> None:
    text = table(("NAME", "N"), [("a", "10"), ("long-name", "7")], right=(1,))
    assert text == "NAME        N\na          10\nlong-name   7"
    assert facts((("one", "1"), ("none", ""), ("three", "a\nb"))) == "one:   1\nthree: a\n       b"
    assert "\x1b" not in table(("NAME",), [("evil\x1b[2J",)])


def test_prose_fits_the_terminal_and_words_stay_whole() -> None:
    prose = "the jail is the only boundary between a guest and this host; " * 3
    text = facts((("reduced", prose), ("one", "1")), width=60)
    first, second, *_, last = text.splitlines()
    assert max(map(len, text.splitlines())) <= 60
    assert (first[:9], second[:9]) == ("reduced: ", " " * 9)
    assert " ".join(text.split()).startswith(f"reduced: {prose.strip()}")
    assert last == "one:     1"
    assert fold("x" * 90, 60, 4) == "x" * 90
    assert fold(prose, None, 4) == prose


def test_tables_fit_the_terminal() -> None:
    rows = [("a-long-name-of-a-vm", "t" * 30, "12", "u" * 10), ("b", "short", "3", "v")]
    text = table(("NAME", "TEXT", "N", "MORE"), rows, right=(2,), width=50)
    assert max(map(len, text.splitlines())) == 50
    assert "a-long-name-of-a-vm  tttt" in text
    assert "…" in text
    assert "t" * 30 in table(("NAME", "TEXT", "N", "MORE"), rows, right=(2,))
    # What cannot be narrower is not: the names are whole.
    assert "a-long-name-of-a-vm" in table(("NAME", "TEXT", "N", "MORE"), rows, width=10)


def test_tables_on_a_terminal_have_its_width(api: Served, run: Any) -> None:
    for number in range(3):
        run("vm", "create", "--name", f"a-rather-long-name-number-{number}", "--description", "d" * 90)
    bare = {"COLUMNS": "72", "NO_COLOR": "1"}
    whole = run("operation", "list", environ=bare).out.splitlines()
    lines = run("operation", "list", terminal=True, environ=bare).out.splitlines()
    assert max(map(len, whole)) > 72 >= max(map(len, lines))


def test_texts_of_guests_do_not_drive_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x1b]0;title\x07c\rd\x08") == "abcd\N{REPLACEMENT CHARACTER}"


def test_following_a_log_takes_only_what_is_new() -> None:
    assert added(b"one\ntwo\n", b"one\n") == b"two\n"
    assert added(b"new\n", b"one\n") == b"new\n"
    assert last_lines(b"a\nb\nc", 2) == b"b\nc"
    assert last_lines(b"a\n", 0) == b""
