"""Images on this host."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, post
from litestar.params import JSONBody, PathParameter

from mica.api.params import EngineDep, TermsDep, submit
from mica.engine.definition import NoParams
from mica.model.operation import Operation
from mica.model.views import ImageMake, ImagePage, ImageView

IMAGE = "/v1/images/{image:str}"
NOTHING = NoParams()
Ref = Annotated[str, PathParameter(description="An image's name or digest")]


@get("/v1/images", summary="List images", operation_id="image_list")
async def list_images(engine: EngineDep) -> ImagePage:
    return await engine.images()


@post("/v1/images", status_code=202, summary="Build or import an image", operation_id="image_make")
async def make(engine: EngineDep, terms: TermsDep, data: JSONBody[ImageMake]) -> Response[Operation]:
    return await submit(engine, "image.make", "", data, terms)


@get(IMAGE, summary="Show an image", operation_id="image_show")
async def show(engine: EngineDep, image: Ref) -> Response[ImageView]:
    view = await engine.image(image)
    return Response(view, headers={"ETag": f'"{view.generation}"'})


@delete(IMAGE, status_code=202, summary="Delete an image", operation_id="image_delete")
async def remove(engine: EngineDep, terms: TermsDep, image: Ref) -> Response[Operation]:
    return await submit(engine, "image.delete", image, NoParams(), terms)


@post(f"{IMAGE}/verify", status_code=202, summary="Read every byte and compare", operation_id="image_verify")
async def verify(
    engine: EngineDep, terms: TermsDep, image: Ref, data: JSONBody[NoParams] = NOTHING
) -> Response[Operation]:
    return await submit(engine, "image.verify", image, data, terms)


HANDLERS = [list_images, make, show, remove, verify]
