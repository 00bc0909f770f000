"""What the engine needs from the image store."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mica.model.image import Image, ImageRecipe
from mica.ports.progress import Progress


class Images(Protocol):
    """Immutable image files on this host, kept by content.

    Building and importing are atomic: the files appear under their digest complete and fsynced, or not at all.
    """

    async def make(self, recipe: ImageRecipe, progress: Progress) -> Image:
        """Build or import an image; seconds to minutes. Idempotent by content.

        Raises ``invalid`` (a recipe that cannot be met), ``host-lacks`` (a program), ``command-failed`` (with the
        program's last words), ``corrupt`` (not an image, or damaged), ``insufficient-disk``.
        """

    async def verify(self, image: Image, progress: Progress) -> None:
        """Read every byte and compare. Raises ``corrupt`` naming the file and both digests, or ``not-found``."""

    async def remove(self, digest: str) -> None:
        """Delete the files; removing what is absent is not an error."""

    async def present(self) -> list[Image]:
        """What lies on this host, from the manifests; leftovers of interrupted builds are removed first."""

    def path(self, image: Image, file: str) -> Path:
        """Where a file of the image lies, read-only for everybody who may run it."""
