"""The store's images and the files on this host are the same set."""

from __future__ import annotations

from mica.engine.definition import Env
from mica.engine.records import Draft, ImageRow
from mica.ports.store import ABSENT, Conflict


async def reconcile(env: Env) -> str:
    """Files without a row get one (a restored home, an image copied in); rows without files are marked damaged."""
    unfinished = any(
        o.value.verb.startswith("image.") and not o.value.state.ended
        for o in (await env.records.operations.scan()).values()
    )
    if unfinished:
        return ""  # an operation is moving files right now; what it leaves is looked at in the next round
    # Rows are read before and after the files: an operation that runs meanwhile changes both, and is left alone.
    before = await env.records.images.scan()
    present = {image.digest: image for image in await env.images.present()}
    after = await env.records.images.scan()
    adopted = lost = 0
    for digest in present.keys() - before.keys() - after.keys():
        draft = Draft()
        draft.put(env.records.images, digest, ImageRow(present[digest]), ABSENT)
        try:
            await env.records.commit(draft)
        except Conflict:
            continue
        adopted += 1
    for digest in (before.keys() & after.keys()) - present.keys():
        row = after[digest]
        if not row.value.damaged and row.generation == before[digest].generation:
            draft = Draft()
            missing = ImageRow(row.value.image, row.value.verified_at, "its files are missing")
            draft.put(env.records.images, digest, missing, row.generation)
            try:
                await env.records.commit(draft)
            except Conflict:
                continue
            lost += 1
    said = [f"adopted {adopted} images" if adopted else "", f"{lost} images lost their files" if lost else ""]
    return ", ".join(s for s in said if s)
