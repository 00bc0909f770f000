"""Images: list, build, import, verify, delete."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mica.client.operations import OnProgress, Operations
from mica.client.transport import Transport, path_of
from mica.model.errors import Code, MicaError, not_found
from mica.model.image import BUILT_IN, ImageRecipe
from mica.model.operation import Operation
from mica.model.views import ImageMake, ImagePage, ImageView

Waiter = Callable[[Operation], Awaitable[Operation]]


class Images:
    """``client.images``. ``ref`` is a name or a digest."""

    def __init__(self, transport: Transport, operations: Operations) -> None:
        self._transport = transport
        self._operations = operations

    async def list(self) -> list[ImageView]:
        page = await self._transport.request("GET", path_of("images"), ImagePage)
        return list(page.items)

    async def get(self, ref: str) -> ImageView:
        return await self._transport.request("GET", path_of("images", ref), ImageView)

    async def make(self, recipe: ImageRecipe, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Build or import an image: seconds to minutes. Raises ``host-lacks``, ``command-failed`` and others."""
        body = ImageMake(recipe)
        operation = await self._transport.request("POST", path_of("images"), Operation, body=body)
        return await self._operations.wait(operation.id, on_progress) if wait else operation

    async def verify(self, ref: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Read every byte and compare. Raises ``corrupt``."""
        operation = await self._transport.request("POST", path_of("images", ref, "verify"), Operation)
        return await self._operations.wait(operation.id, on_progress) if wait else operation

    async def delete(self, ref: str, *, wait: bool = True, on_progress: OnProgress | None = None) -> Operation:
        """Delete an image that no VM was made from. Raises ``in-use``."""
        operation = await self._transport.request("DELETE", path_of("images", ref), Operation)
        return await self._operations.wait(operation.id, on_progress) if wait else operation

    async def ensure(self, ref: str, *, waiter: Waiter | None = None) -> ImageView:
        """The image ``ref``, built first if it is one that Mica knows how to make and it is not there yet.

        ``waiter`` waits for the build. Raises ``not-found`` naming the images that there are.
        """
        try:
            return await self.get(ref)
        except MicaError as error:
            if error.code is not Code.NOT_FOUND:
                raise
        if ref not in BUILT_IN:
            raise await self._unknown(ref)
        operation = await self.make(BUILT_IN[ref](), wait=False)
        await (waiter(operation) if waiter else self._operations.wait(operation.id))
        return await self.get(ref)

    async def _unknown(self, ref: str) -> MicaError:
        there = sorted({view.image.name for view in await self.list()})
        hint = f"there are: {', '.join(there)}; " if there else "there are none yet; "
        buildable = [name for name in BUILT_IN if name not in there]
        hint += f"built on first use: {', '.join(buildable)}; " if buildable else ""
        return not_found("image", ref, hint=hint + "others come with: mica image import FILE --name NAME")
