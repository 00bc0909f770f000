"""Debian's packages on this host: resolved, downloaded and checked by apt, in a tree of its own, by any user.

apt runs with a private configuration, so neither the host's package database nor its repositories of other vendors
play a part; of the host's configuration only how to reach the network is taken over. Packages are kept between builds
and bounded: what the suite no longer has goes first, then what was not used for long.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

import msgspec

from mica.images.commands import CommandError, Commands, Line
from mica.images.files import locked
from mica.images.sources import Source
from mica.model.errors import Code, MicaError, invalid
from mica.model.units import GIB
from mica.ports.progress import Progress

# How many bytes of packages are kept for one suite, and for how long unused ones.
KEEP_BYTES = 2 * GIB
KEEP_UNUSED_S = 30 * 86400

_UPDATE_TIMEOUT_S = 300
_DOWNLOAD_TIMEOUT_S = 1800
_LOCK_TIMEOUT_S = 1800
_DATE = re.compile(r"^Date: (.*)$", re.MULTILINE)
_INSTALL = re.compile(r"Inst (\S+) (?:\[\S*\] )?\((\S+) .*\[(\w+)\]")
_UNKNOWN = re.compile(r"E: Unable to locate package (\S+)")
# How the host reaches its mirrors: proxies, certificates, retries, clocks that mirrors of a past day need.
_NETWORK = re.compile(r"Acquire::(https?|Retries|Check-Valid-Until|Check-Date|ForceIPv[46]|Max-FutureTime)\b", re.I)


class Deb(msgspec.Struct, frozen=True):
    """A package file. ``version`` is Debian's, epoch included."""

    name: str
    version: str
    path: Path


class Apt:
    """The packages of one suite, kept in ``directory``. Two processes may share it: it is locked while in use."""

    def __init__(self, commands: Commands, directory: Path, sources: Sequence[Source]) -> None:
        self._commands = commands
        self._directory = directory
        self.sources = tuple(sources)

    async def fetch(self, packages: Sequence[str], into: Path, progress: Progress) -> list[Deb]:
        """Download packages and all that they depend on, and link them into the directory ``into``.

        ``progress`` gets fractions of this step. Raises ``invalid`` (no such package or suite), ``command-failed``,
        ``timeout``, ``busy``, ``host-lacks``.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        async with locked(self._directory / "lock", timeout_s=_LOCK_TIMEOUT_S, what="the package cache"):
            configuration = await self._configure()
            await self._update(configuration, progress)
            progress(0.4, "Working out dependencies")
            wanted = await self._closure(configuration, packages)
            await self._download(configuration, packages, progress)
            archives = self._directory / "archives"
            debs = [
                Deb(name, version, archives / f"{name}_{version.replace(':', '%3a')}_{arch}.deb")
                for name, version, arch in wanted
            ]
            linked = [msgspec.structs.replace(deb, path=_take(deb, into)) for deb in debs]
            await self._apt(configuration, "autoclean")
            self._prune()
        return linked

    async def closure(self, packages: Sequence[str]) -> list[str]:
        """Names of ``packages`` and of all that they depend on, from the package lists of the last :meth:`fetch`."""
        return [name for name, _, _ in await self._closure(self._directory / "apt.conf", packages)]

    async def copy_lists(self, into: Path) -> int:
        """Link the package lists into the new directory ``into``; return when they were made, in Unix seconds."""
        into.mkdir()
        dates = [0]
        async with locked(self._directory / "lock", timeout_s=_LOCK_TIMEOUT_S, what="the package cache"):
            for path in sorted((self._directory / "lists").iterdir()):
                if path.is_file() and path.name != "lock":
                    _link(path, into / path.name)
                if path.name.endswith("Release") and (date := _DATE.search(path.read_text(errors="replace"))):
                    dates.append(int(parsedate_to_datetime(date.group(1)).timestamp()))
        return max(dates)

    async def network_options(self) -> list[str]:
        """Lines of apt configuration that say how this host reaches its mirrors."""
        dump = await self._commands.output(["apt-config", "dump", "--format", '%F "%v";%n', "Acquire"], timeout_s=30)
        return [line for line in dump.splitlines() if _NETWORK.match(line) and not line.endswith('"";')]

    async def _configure(self) -> Path:
        home = self._directory
        for name in (
            "lists/partial",
            "archives/partial",
            "cache",
            "log",
            "etc/sources.list.d",
            "etc/apt.conf.d",
            "etc/preferences.d",
        ):
            (home / name).mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        (home / "etc/sources.list.d/mica.sources").write_text("\n".join(s.stanza() for s in self.sources))
        lines = [
            # The host's own configuration is left out: it may hold hooks that act on the host.
            f'Dir::Etc "{home}/etc";',
            'Dir::Etc::Trusted "/etc/apt/trusted.gpg";',
            'Dir::Etc::TrustedParts "/etc/apt/trusted.gpg.d";',
            f'Dir::State "{home}";',
            f'Dir::State::Lists "{home}/lists";',
            f'Dir::State::Status "{home}/status";',
            f'Dir::Cache "{home}/cache";',
            f'Dir::Cache::Archives "{home}/archives";',
            f'Dir::Log "{home}/log";',
            'APT::Architecture "amd64";',
            'APT::Architectures { "amd64"; };',
            'APT::Install-Recommends "false";',
            'APT::Clean-Installed "false";',
            'Acquire::Languages "none";',
            'Debug::NoLocking "true";',
            *await self.network_options(),
        ]
        path = home / "apt.conf"
        path.write_text("\n".join(lines) + "\n")
        return path

    async def _update(self, configuration: Path, progress: Progress) -> None:
        progress(0.0, "Reading the package lists")
        try:
            await self._apt(configuration, "update", "-o", "APT::Update::Error-Mode=any", timeout_s=_UPDATE_TIMEOUT_S)
        except CommandError as error:
            words = " ".join(error.words)
            if "does not have a Release file" in words or "404" in words:
                where = ", ".join(f"{source.uri} {source.suite}" for source in self.sources)
                raise invalid(
                    f"there is no such suite on the mirror ({where})", hint="choose another suite, such as bookworm"
                ) from error
            # apt checks how old signed lists may be, so lists of an earlier day are good enough to go on with.
            if not any(self._directory.glob("lists/*_Packages*")):
                raise _unreachable(error) from error
            progress(0.3, "The mirror does not answer: going on with the package lists of the last build")

    async def _closure(self, configuration: Path, packages: Sequence[str]) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = []

        def see(line: str) -> None:
            if match := _INSTALL.match(line):
                found.append((match[1], match[2], match[3]))

        try:
            await self._apt(configuration, "install", "--simulate", *packages, see=see)
        except CommandError as error:
            missing = [word for word in error.words if word.startswith("E: ")]
            if unknown := sorted({at[1] for word in missing if (at := _UNKNOWN.match(word))}):
                suite = self.sources[0].suite
                raise invalid(
                    f"there is no package {', '.join(map(repr, unknown))} in {suite}",
                    hint=f"look for its name: https://packages.debian.org/{suite}/",
                ) from error
            raise invalid(
                f"these packages cannot be installed together: {', '.join(packages)}: {' '.join(missing)}",
                hint="look at the names of the packages",
            ) from error
        return found

    async def _download(self, configuration: Path, packages: Sequence[str], progress: Progress) -> None:
        def see(line: str) -> None:
            # dlstatus:NUMBER:PERCENT:TEXT, see apt's doc/progress-reporting.md
            kind, _, rest = line.partition(":")
            fields = rest.split(":")
            if kind == "dlstatus" and len(fields) >= 3:
                progress(0.5 + float(fields[1]) / 200, f"Downloading packages: {fields[2]}")

        try:
            await self._apt(
                configuration,
                "install",
                "--download-only",
                "--yes",
                "-o",
                "APT::Status-Fd=1",
                *packages,
                see=see,
                timeout_s=_DOWNLOAD_TIMEOUT_S,
            )
        except CommandError as error:
            raise _unreachable(error) from error

    async def _apt(
        self,
        configuration: Path,
        *arguments: str,
        see: Line | None = None,
        timeout_s: float = 120,
    ) -> None:
        await self._commands.run(
            ["apt-get", "-q", *arguments],
            timeout_s=timeout_s,
            stdout=see,
            environment={"APT_CONFIG": str(configuration), "DEBIAN_FRONTEND": "noninteractive"},
        )

    def _prune(self) -> None:
        """Keep the packages used last, up to the bounds."""
        kept = 0
        oldest = time.time() - KEEP_UNUSED_S
        debs = [(path, path.stat()) for path in (self._directory / "archives").glob("*.deb")]
        for path, status in sorted(debs, key=lambda deb: deb[1].st_mtime, reverse=True):
            kept += status.st_size
            if kept > KEEP_BYTES or status.st_mtime < oldest:
                path.unlink(missing_ok=True)


def _take(deb: Deb, into: Path) -> Path:
    """Link a package into a build, so that the cache may forget it meanwhile, and mark it as used now."""
    target = into / deb.path.name
    os.utime(deb.path)
    _link(deb.path, target)
    return target


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)


def _unreachable(error: CommandError) -> MicaError:
    return MicaError(
        Code.COMMAND_FAILED,
        f"Debian's packages could not be downloaded: {'; '.join(error.words)}",
        hint="check that this host reaches its Debian mirror (apt-get update), or set a mirror or a proxy",
        retryable=True,
        details=error.details,
    )
