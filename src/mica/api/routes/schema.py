"""The description of the API."""

from __future__ import annotations

from typing import Any

from litestar import Response, get


@get("/v1/openapi.json", include_in_schema=False)
async def openapi() -> Response[bytes]:
    from mica.api.openapi import document  # built on demand: the daemon at rest carries neither it nor its parts

    return Response(document(), media_type="application/json")


HANDLERS: list[Any] = [openapi]
