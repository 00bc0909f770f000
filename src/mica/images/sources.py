"""Where Debian's packages come from: the host's own mirrors when it is a Debian whose sources cover the suite.

A host behind a company mirror or without the Internet has that mirror in its apt sources, with its keys; so these win
over the public mirror. Third-party repositories are left out, also those that serve a suite of the same name: apt
itself tells the origin of each (``apt-get indextargets``, apt's doc/acquire-additional-files.md).
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from mica.images.commands import CommandError, Commands
from mica.model.errors import Code, MicaError, invalid

PUBLIC_MIRROR = "http://deb.debian.org/debian"
PUBLIC_SECURITY_MIRROR = "http://deb.debian.org/debian-security"
ARCHIVE_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_SUITE = re.compile(r"[a-z][a-z0-9-]{1,31}")
_TARGET_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(SOURCESENTRY)"
# Suites that move every day have no security suite of their own.
_ROLLING = frozenset({"sid", "unstable", "experimental"})


class Source(msgspec.Struct, frozen=True):
    """One suite of one mirror. ``signed_by`` is apt's field: paths of keyrings, or a key itself; empty: apt's own."""

    uri: str
    suite: str
    signed_by: str = ""

    def stanza(self) -> str:
        """As deb822, see sources.list(5)."""
        signed_by = f"Signed-By: {self.signed_by}\n" if self.signed_by else ""
        return f"Types: deb\nURIs: {self.uri}\nSuites: {self.suite}\nComponents: main\n{signed_by}"


class Mirror(msgspec.Struct, frozen=True):
    """A mirror that the administrator chose. ``security`` defaults to the sibling of ``uri``."""

    uri: str
    security: str = ""
    keyring: Path | None = None


def check_suite(suite: str) -> None:
    """Raises ``invalid`` when ``suite`` cannot be the name of a Debian suite."""
    if not _SUITE.fullmatch(suite):
        raise invalid(
            f"{suite!r} is not the name of a Debian suite", hint="for example bookworm or trixie", field="suite"
        )


async def find_sources(commands: Commands, suite: str, mirror: Mirror | None) -> tuple[Source, ...]:
    """The sources for ``suite``: the chosen mirror, else the host's own, else Debian's public mirror.

    Raises ``invalid`` (a name that no suite has), ``host-lacks`` (no key to check the public mirror with).
    """
    check_suite(suite)
    if mirror is None and (own := await _host_sources(commands, suite)):
        return own
    chosen = mirror or Mirror(PUBLIC_MIRROR, PUBLIC_SECURITY_MIRROR)
    keyring = chosen.keyring or ARCHIVE_KEYRING
    if not keyring.exists():
        raise MicaError(
            Code.HOST_LACKS,
            f"the keyring {keyring}, which Debian's packages are checked with, is not there",
            hint="apt-get install debian-archive-keyring",
            details={"path": str(keyring)},
        )
    uri = chosen.uri.rstrip("/")
    if suite in _ROLLING:
        return (Source(uri, suite, str(keyring)),)
    security = chosen.security.rstrip("/") or f"{uri}-security"
    return (
        Source(uri, suite, str(keyring)),
        Source(uri, f"{suite}-updates", str(keyring)),
        Source(security, f"{suite}-security", str(keyring)),
    )


async def _host_sources(commands: Commands, suite: str) -> tuple[Source, ...]:
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    try:
        text = await commands.output(
            ["apt-get", "indextargets", "--format", _TARGET_FORMAT, "Created-By: Packages"], timeout_s=30
        )
    except CommandError:
        return ()  # broken sources of the host are the host's affair; the public mirror still serves
    found: dict[tuple[str, str], Source] = {}
    for line in text.splitlines():
        uri, release, component, origin, entry = [*line.split("|"), "", "", "", ""][:5]
        if release in wanted and component == "main" and _is_debian(uri, origin):
            found.setdefault((uri, release), Source(uri.rstrip("/"), release, signed_by(entry)))
    return tuple(found.values()) if any(release == suite for _, release in found) else ()


def _is_debian(uri: str, origin: str) -> bool:
    """By what the downloaded Release file says; by the path while there is none (a fresh machine)."""
    if origin and not origin.startswith("$("):
        return origin == "Debian"
    return uri.rstrip("/").rsplit("/", 1)[-1] in ("debian", "debian-security")


def signed_by(entry: str) -> str:
    """The ``Signed-By`` of a source as ``indextargets`` names it: a file and the number of line or stanza in it."""
    name, _, number = entry.rpartition(":")
    if not name or not number.isdigit():
        return ""
    try:
        text = Path(name).read_text(errors="replace")
    except OSError:
        return ""
    if name.endswith(".sources"):
        return _from_stanza(text, int(number))
    lines = text.splitlines()
    if int(number) > len(lines):
        return ""
    option = re.search(r"\[[^\]]*signed-by=([^\s\]]+)", lines[int(number) - 1])
    return option.group(1).replace(",", " ") if option else ""


def _from_stanza(text: str, number: int) -> str:
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    stanzas = [stanza for stanza in re.split(r"\n[ \t]*\n", kept.strip("\n")) if stanza.strip()]
    if number > len(stanzas):
        return ""
    field = re.search(r"^signed-by:[ \t]*(.*(?:\n[ \t].*)*)", stanzas[number - 1], re.IGNORECASE | re.MULTILINE)
    return field.group(1).rstrip() if field else ""
