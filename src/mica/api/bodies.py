"""Request bodies: strict JSON into the structs of the model, with errors that name the field and what is allowed.

The model's structs are also stored rows, and a row written by another version may hold fields that this one does not
know; a request may not. So unknown fields are refused here, at every depth, whatever the struct says.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from litestar import Request
from litestar.datastructures import State
from msgspec import inspect

from mica.model.errors import MicaError, invalid


@cache
def _type_info(type_: Any) -> inspect.Type:
    return inspect.type_info(type_)


def _struct_of(info: inspect.Type, raw: dict[str, Any]) -> inspect.StructType | None:
    """The struct that ``raw`` will become; of a tagged union, the one with its tag."""
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    structs = [option for option in options if isinstance(option, inspect.StructType)]
    if len(structs) > 1:
        structs = [s for s in structs if s.tag_field is not None and raw.get(s.tag_field) == s.tag]
    return structs[0] if structs else None


def _item_of(info: inspect.Type) -> inspect.Type | None:
    for option in info.types if isinstance(info, inspect.UnionType) else (info,):
        if isinstance(option, inspect.CollectionType):
            return option.item_type
        if isinstance(option, inspect.DictType):
            return option.value_type
    return None


def _check_fields(raw: Any, info: inspect.Type, where: str) -> None:
    if isinstance(raw, dict) and (struct := _struct_of(info, raw)) is not None:
        fields = {field.encode_name: field.type for field in struct.fields}
        allowed = sorted([*fields, *([struct.tag_field] if struct.tag_field else [])])
        for name, value in raw.items():
            if name not in allowed:
                raise invalid(
                    f"unknown field {where + name!r}",
                    hint=f"fields here: {', '.join(allowed) or 'none'}",
                    field=where + name,
                    allowed=allowed,
                )
            if name in fields:
                _check_fields(value, fields[name], f"{where}{name}.")
        return
    item = _item_of(info)
    if item is not None and isinstance(raw, list | dict):
        pairs = raw.items() if isinstance(raw, dict) else enumerate(raw)
        for key, value in pairs:
            _check_fields(value, item, f"{where}{key}.")


def _explain(error: msgspec.ValidationError) -> MicaError:
    text, _, path = str(error).partition(" - at `$")
    field = path.rstrip("`").removeprefix(".") or "the body"
    return invalid(f"{field}: {text[0].lower()}{text[1:]}", field=field, hint="see /v1/openapi.json for what is taken")


def decode(body: bytes, type_: Any) -> Any:
    """``body`` as ``type_``. Raises ``invalid`` naming the field."""
    try:
        _check_fields(msgspec.json.decode(body), _type_info(type_), "")
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not JSON: {error}", hint="send one JSON object in UTF-8") from None


class StrictRequest(Request[Any, Any, State]):
    """Decodes a body straight into the handler's ``data``; Litestar's own way is lax (``"2"`` becomes 2)."""

    async def json(self) -> Any:
        field = self.route_handler.parsed_data_field
        if field is None:
            return None
        return decode(await self.body(), field.annotation)
