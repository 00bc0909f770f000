"""Root's view of files without being root: user namespaces with the ids of /etc/subuid (subuid(5), user_namespaces(7)).

An ordinary user's build makes files that belong to the user's subordinate ids, which the user may neither read as
root would nor delete. ``mmdebstrap --unshare-helper`` runs a program where they are root's; on Ubuntu 24.04 it is also
one of the programs that AppArmor lets make such namespaces. Paths are given relative to the working directory, because
the ids in the namespace may not pass through a private home directory.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
from pathlib import Path

from mica.images.commands import SEARCH_PATH, CommandError, Commands
from mica.images.files import in_thread, remove_tree
from mica.model.errors import Code, MicaError

# A link in a scratch directory to where a build had to put its temporary files instead.
ELSEWHERE = "elsewhere"
# The directory in a scratch directory that holds files of subordinate ids.
TREE = "tree"
_LAST_WAIT_S = 5.0


class Namespace:
    """How to run programs as root: as they are when we are root, else through the helper."""

    def __init__(self, commands: Commands, *, uid: int | None = None) -> None:
        self._commands = commands
        self._uid = os.geteuid() if uid is None else uid

    @property
    def mode(self) -> str:
        """The ``--mode`` of mmdebstrap."""
        return "root" if self._uid == 0 else "unshare"

    @property
    def prefix(self) -> list[str]:
        """What to put before a program and its arguments."""
        return [] if self._uid == 0 else ["mmdebstrap", "--unshare-helper"]

    @property
    def builder(self) -> list[str]:
        """What to put before mmdebstrap: namespaces of its own, so that its mounts and processes end with it.

        Without root it makes such itself.
        """
        return ["unshare", "--mount", "--pid", "--mount-proc", "--kill-child", "--"] if self._uid == 0 else []

    def check(self) -> None:
        """Raises ``host-lacks`` when this user cannot have such a namespace, with the command that changes it."""
        self._commands.find("mmdebstrap")
        if self._uid == 0:
            return
        self._commands.find("newuidmap")
        user = pwd.getpwuid(self._uid).pw_name
        for kind in ("uid", "gid"):
            path = Path(f"/etc/sub{kind}")
            lines = path.read_text().splitlines() if path.exists() else []
            if not any(line.split(":", 1)[0] in (user, str(self._uid)) for line in lines):
                raise MicaError(
                    Code.HOST_LACKS,
                    f"the user {user} has no range of subordinate ids in {path}, which a build without root needs",
                    hint=f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
                    details={"path": str(path), "user": user},
                )

    def temporary(self, scratch: Path) -> Path:
        """A directory that the build's ids can reach: ``scratch`` itself, or one below /var/tmp linked from it.

        The ids in the namespace are "others" on the way there.
        """
        if self._uid == 0 or all(parent.stat().st_mode & 0o001 for parent in scratch.parents):
            return scratch
        place = Path("/var/tmp") / f"mica-{scratch.parent.name}"  # noqa: S108 - a random name, made by mkdir(2)
        (scratch / ELSEWHERE).symlink_to(place)
        place.mkdir(mode=0o711)
        place.chmod(0o711)
        return place

    async def remove(self, home: Path) -> None:
        """Remove a work directory of the store with all that a build may have left in it and elsewhere."""
        if self._uid != 0:
            for place in (home / "scratch" / ELSEWHERE, home / "scratch" / TREE, home / "scratch"):
                await self._empty(place)
            link = home / "scratch" / ELSEWHERE
            if link.is_symlink():
                await in_thread(lambda _: remove_tree(link.readlink()))
        await in_thread(lambda _: remove_tree(home))

    async def _empty(self, place: Path) -> None:
        """Remove from ``place`` what belongs to subordinate ids.

        A build whose daemon was killed may still be busy there until its files are gone, and then fails: so try again.
        """
        if not place.is_dir() or shutil.which("mmdebstrap", path=SEARCH_PATH) is None:
            return
        wait_s = 0.1
        while foreign := [path.name for path in place.iterdir() if path.lstat().st_uid != self._uid]:
            place.chmod(0o777)  # within a directory that only we may enter, or one that has nothing but our build
            try:
                argv = [*self.prefix, "rm", "-rf", "--", *(f"./{name}" for name in foreign)]
                await self._commands.run(argv, timeout_s=300, cwd=place)
            except CommandError as error:
                if wait_s > _LAST_WAIT_S:
                    raise MicaError(
                        Code.COMMAND_FAILED,
                        f"the leftovers of a build in {place} could not be removed: {error.message}",
                        hint=f"as root: rm -rf {place}",
                    ) from error
                await asyncio.sleep(wait_s)
                wait_s *= 2
