"""The image store that the daemon uses: recipes in, images out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mica.images import importer, micro
from mica.images.apt import Apt
from mica.images.commands import Commands
from mica.images.debian import DebianBuild
from mica.images.files import disk_full_is_said
from mica.images.sources import Mirror, find_sources
from mica.images.store import ContentStore, Draft
from mica.images.userns import Namespace
from mica.model.image import Image, ImageRecipe, ImportRecipe, MicroRecipe
from mica.ports.progress import Progress


class DirectoryImages:
    """Implements :class:`mica.ports.images.Images` in the directory ``root``.

    ``cache`` keeps Debian's packages between builds (default: ``cache/packages`` beside ``root``); ``mirror``
    overrides where they come from; ``environment`` is added to that of every program (proxies).
    """

    def __init__(
        self,
        root: Path,
        *,
        cache: Path | None = None,
        mirror: Mirror | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._root = root.absolute()
        self._cache = (cache or root.parent / "cache" / "packages").absolute()
        self._mirror = mirror
        self._commands = Commands(environment)
        self._namespace = Namespace(self._commands)
        self._store = ContentStore(self._root, self._namespace.remove)

    async def make(self, recipe: ImageRecipe, progress: Progress) -> Image:
        async with self._store.draft() as draft:
            with disk_full_is_said(self._root, f"building the image {recipe.name}"):
                await self._build(recipe, draft, progress)
            return await self._store.land(draft, recipe.name, progress)

    async def verify(self, image: Image, progress: Progress) -> None:
        await self._store.verify(image, progress)

    async def remove(self, digest: str) -> None:
        await self._store.remove(digest)

    async def present(self) -> list[Image]:
        await self._store.sweep()
        return await self._store.images()

    def path(self, image: Image, file: str) -> Path:
        return self._store.directory(image.digest) / file

    async def _build(self, recipe: ImageRecipe, draft: Draft, progress: Progress) -> None:
        if isinstance(recipe, ImportRecipe):
            await importer.build(recipe, draft, self._commands, progress)
            return
        sources = await find_sources(self._commands, recipe.suite, self._mirror)
        apt = Apt(self._commands, self._cache / recipe.suite, sources)
        if isinstance(recipe, MicroRecipe):
            await micro.build(recipe, draft, self._commands, apt, progress)
        else:
            await DebianBuild(recipe, draft, self._commands, apt, self._namespace, progress).run()
