"""Names and slots for VMs that are about to be."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.model.errors import Code, MicaError

# Slots number the VMs of a host; a private /24 network and a user id derive from each.
MAX_SLOTS = 16384
# A name is at most 63 characters, and a made one ends with a hyphen and a number.
MAX_STEM = 56


async def free_slot(env: Env) -> int:
    taken = {int(id_) for id_ in await env.records.slots.scan()}
    slot = next((n for n in range(MAX_SLOTS) if n not in taken), None)
    if slot is None:
        raise MicaError(Code.BUSY, f"this host has {MAX_SLOTS} VMs already", hint="delete some")
    return slot


async def free_name(env: Env, stem: str) -> str:
    stem = stem[:MAX_STEM].rstrip("-")
    taken = set(await env.records.names.scan(after=stem[:-1]))
    return next(name for n in range(1, MAX_SLOTS + 2) if (name := f"{stem}-{n}") not in taken)
