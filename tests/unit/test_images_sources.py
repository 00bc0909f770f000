"""Where packages come from: the host's own mirrors, or Debian's."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from mica.images.apt import Apt
from mica.images.commands import Commands
from mica.images.sources import Mirror, Source, find_sources, signed_by
from mica.model.errors import Code, MicaError


def programs(tmp_path: Path, **scripts: str) -> Commands:
    """Commands that find fakes of the named programs first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
        path.chmod(0o755)
    return Commands({"PATH": f"{folder}:/usr/bin:/bin:/usr/sbin:/sbin"})


TARGETS = """\
    cat <<END
    http://mirror.corp/debian/|bookworm|main|Debian|/etc/apt/sources.list:1
    http://mirror.corp/debian/|bookworm-updates|main|Debian|/etc/apt/sources.list:2
    http://mirror.corp/debian/|bookworm|contrib|Debian|/etc/apt/sources.list:1
    http://mirror.corp/debian/|bookworm-backports|main|Debian|/etc/apt/sources.list:3
    http://mirror.corp/debian-security/|bookworm-security|main||/etc/apt/sources.list:4
    https://apt.vendor.example/|bookworm|main|Vendor|/etc/apt/sources.list.d/vendor.list:1
    https://apt.other.example/stuff|bookworm|main||/etc/apt/sources.list.d/other.list:1
    END
"""


async def test_the_hosts_own_debian_sources_win_and_vendors_stay_out(tmp_path: Path) -> None:
    sources = await find_sources(programs(tmp_path, apt_get=textwrap.dedent(TARGETS)), "bookworm", None)
    assert [(source.uri, source.suite) for source in sources] == [
        ("http://mirror.corp/debian", "bookworm"),
        ("http://mirror.corp/debian", "bookworm-updates"),
        ("http://mirror.corp/debian-security", "bookworm-security"),
    ]


@pytest.mark.parametrize("script", [TARGETS, "exit 100\n", "true\n"])
async def test_a_suite_that_the_host_does_not_cover_comes_from_debians_mirror(tmp_path: Path, script: str) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    commands = programs(tmp_path, apt_get=textwrap.dedent(script))
    mirror = Mirror("http://deb.debian.org/debian", keyring=keyring)
    sources = await find_sources(commands, "trixie", mirror)
    assert [source.suite for source in sources] == ["trixie", "trixie-updates", "trixie-security"]
    assert sources[2].uri == "http://deb.debian.org/debian-security"
    assert {source.signed_by for source in sources} == {str(keyring)}


async def test_a_chosen_mirror_wins_over_the_host(tmp_path: Path) -> None:
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    mirror = Mirror("http://near/debian/", "http://near/security", keyring)
    sources = await find_sources(programs(tmp_path, apt_get=textwrap.dedent(TARGETS)), "bookworm", mirror)
    assert [source.uri for source in sources] == ["http://near/debian"] * 2 + ["http://near/security"]


async def test_no_key_no_mirror(tmp_path: Path) -> None:
    mirror = Mirror("http://near/debian", keyring=tmp_path / "absent.gpg")
    with pytest.raises(MicaError) as caught:
        await find_sources(Commands(), "bookworm", mirror)
    assert caught.value.code is Code.HOST_LACKS
    assert "debian-archive-keyring" in caught.value.hint


@pytest.mark.parametrize("suite", ["", "Bookworm", "../etc", "book worm", "a\nb", "-o", "x" * 50])
async def test_what_cannot_be_a_suite_is_refused(suite: str) -> None:
    with pytest.raises(MicaError) as caught:
        await find_sources(Commands(), suite, None)
    assert caught.value.code is Code.INVALID


def test_the_key_of_a_source_is_found_where_apt_says(tmp_path: Path) -> None:
    lines = tmp_path / "sources.list"
    lines.write_text("# first\ndeb [arch=amd64 signed-by=/k/a.gpg,/k/b.gpg] http://x s main\ndeb http://y s main\n")
    assert signed_by(f"{lines}:2") == "/k/a.gpg /k/b.gpg"
    assert signed_by(f"{lines}:3") == ""
    assert signed_by(f"{lines}:9") == ""
    stanzas = tmp_path / "debian.sources"
    stanzas.write_text(
        "# comment\nTypes: deb\nURIs: http://x\nSigned-By: /k/one.gpg\n\n"
        "Types: deb\n# comment\nURIs: http://y\nsigned-by:\n -----BEGIN PGP PUBLIC KEY-----\n .\n abc\nSuites: s\n"
    )
    assert signed_by(f"{stanzas}:1") == "/k/one.gpg"
    assert signed_by(f"{stanzas}:2").split("\n")[-1] == " abc"
    assert "Suites" not in signed_by(f"{stanzas}:2")
    assert signed_by(f"{tmp_path}/absent.sources:1") == ""


SOURCES = (Source("http://mirror/debian", "bookworm"),)

FAKE_APT = """\
    test -n "$APT_CONFIG" || exit 99
    home=$(dirname "$APT_CONFIG")
    case "$*" in
      *update*)
        echo "lists" > "$home/lists/mirror_bookworm_main_binary-amd64_Packages" ;;
      *--simulate*)
        echo "Inst gcc-12-base (12.2.0-14 Debian:12/oldstable [amd64])"
        echo "Conf gcc-12-base (12.2.0-14 Debian:12/oldstable [amd64])"
        echo "Inst pkg (1:2.0-1 Debian:12/oldstable, Debian-Security:12/oldstable-security [all]) [x:amd64 ]" ;;
      *--download-only*)
        echo "dlstatus:1:50.0:Retrieving file 1 of 2"
        echo one > "$home/archives/gcc-12-base_12.2.0-14_amd64.deb"
        echo two > "$home/archives/pkg_1%3a2.0-1_all.deb" ;;
    esac
"""
CONFIG = """\
    echo 'Acquire::http::Proxy "http://proxy:3128";'
    echo 'Acquire::Languages "de";'
    echo 'Acquire::http "";'
"""


async def test_packages_are_fetched_into_the_build_and_kept(tmp_path: Path) -> None:
    apt = Apt(programs(tmp_path, apt_get=FAKE_APT, apt_config=CONFIG), tmp_path / "cache", SOURCES)
    build = tmp_path / "build"
    build.mkdir()
    seen: list[float | None] = []
    debs = await apt.fetch(["pkg"], build, lambda fraction, text: seen.append(fraction))
    assert [(deb.name, deb.version, deb.path.read_text()) for deb in debs] == [
        ("gcc-12-base", "12.2.0-14", "one\n"),
        ("pkg", "1:2.0-1", "two\n"),
    ]
    assert {path.name for path in build.iterdir()} == {
        path.name for path in (tmp_path / "cache/archives").glob("*.deb")
    }
    assert 0.75 in seen
    configuration = (tmp_path / "cache/apt.conf").read_text()
    assert 'Acquire::http::Proxy "http://proxy:3128";' in configuration
    assert "de" not in configuration.split('Acquire::Languages "')[1].split('"')[0]
    assert "URIs: http://mirror/debian" in (tmp_path / "cache/etc/sources.list.d/mica.sources").read_text()


async def test_without_the_mirror_the_lists_of_the_last_build_do(tmp_path: Path) -> None:
    failing = FAKE_APT.replace('echo "lists" >', 'echo "E: Could not resolve" >&2; exit 100; echo >')
    apt = Apt(programs(tmp_path, apt_get=failing, apt_config=CONFIG), tmp_path / "cache", SOURCES)
    build = tmp_path / "build"
    build.mkdir()
    with pytest.raises(MicaError) as caught:
        await apt.fetch(["pkg"], build, lambda fraction, text: None)
    assert caught.value.code is Code.COMMAND_FAILED
    assert "Could not resolve" in caught.value.message
    assert "mirror" in caught.value.hint
    (tmp_path / "cache/lists/mirror_bookworm_main_binary-amd64_Packages").touch()
    words: list[str] = []
    assert len(await apt.fetch(["pkg"], build, lambda fraction, text: words.append(text))) == 2
    assert any("does not answer" in word for word in words)


@pytest.mark.parametrize(
    ("line", "said", "message"),
    [
        ("*--simulate*)", "E: Unable to locate package nonsense", "there is no package 'nonsense' in bookworm"),
        ("*--simulate*)", "E: Unmet dependencies", "cannot be installed together: nonsense: E: Unmet"),
        (
            "*update*)",
            "E: The repository 'http://mirror x Release' does not have a Release file.",
            "no such suite",
        ),
    ],
)
async def test_what_debian_does_not_have_is_invalid(tmp_path: Path, line: str, said: str, message: str) -> None:
    failing = FAKE_APT.replace(line, f'{line} echo "{said}" >&2; exit 100 ;;\n      never)')
    apt = Apt(programs(tmp_path, apt_get=failing, apt_config=CONFIG), tmp_path / "cache", SOURCES)
    with pytest.raises(MicaError) as caught:
        await apt.fetch(["nonsense"], tmp_path, lambda fraction, text: None)
    assert caught.value.code is Code.INVALID
    assert message in caught.value.message


async def test_a_mirror_that_vanishes_in_a_download_is_no_fault_of_the_recipe(tmp_path: Path) -> None:
    failing = FAKE_APT.replace(
        "*--download-only*)", '*--download-only*) echo "E: Failed to fetch" >&2; exit 100 ;;\n never)'
    )
    apt = Apt(programs(tmp_path, apt_get=failing, apt_config=CONFIG), tmp_path / "cache", SOURCES)
    with pytest.raises(MicaError) as caught:
        await apt.fetch(["pkg"], tmp_path, lambda fraction, text: None)
    assert (caught.value.code, caught.value.retryable) == (Code.COMMAND_FAILED, True)
