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


def _options(info: inspect.Type) -> tuple[inspect.Type, ...]:
    return info.types if isinstance(info, inspect.UnionType) else (info,)


def _none_of(where: str, value: Any, allowed: list[str]) -> MicaError:
    return invalid(
        f"{where}: {value!r} is not possible",
        hint=f"use {', '.join(allowed)}",
        field=where,
        value=value,
        allowed=allowed,
    )


def _struct_of(info: inspect.Type, raw: dict[str, Any], where: str) -> inspect.StructType | None:
    """The struct that ``raw`` will become; of a tagged union, the one with its tag."""
    structs = [option for option in _options(info) if isinstance(option, inspect.StructType)]
    tag_field = structs[0].tag_field if structs else None
    if len(structs) > 1 and tag_field is not None and tag_field in raw:
        tags = [str(struct.tag) for struct in structs]
        structs = [struct for struct in structs if struct.tag == raw[tag_field]]
        if not structs:
            raise _none_of(f"{where}{tag_field}", raw[tag_field], tags)
    return structs[0] if len(structs) == 1 else None


def _check_fields(raw: Any, info: inspect.Type, where: str) -> None:
    """Raises ``invalid`` for what is not known: fields, tags, words of an enumeration. ``where`` ends with a dot."""
    if isinstance(raw, dict) and (struct := _struct_of(info, raw, where)) is not None:
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
    for option in _options(info):
        if isinstance(option, inspect.CollectionType) and isinstance(raw, list):
            for index, item in enumerate(raw):
                _check_fields(item, option.item_type, f"{where}{index}.")
        elif isinstance(option, inspect.DictType) and isinstance(raw, dict):
            for key, item in raw.items():
                _check_fields(item, option.value_type, f"{where}{key}.")
        elif isinstance(option, inspect.EnumType) and isinstance(raw, str):
            words = [str(word.value) for word in option.cls]
            if raw not in words:
                raise _none_of(where.removesuffix("."), raw, words)


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
