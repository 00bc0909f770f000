"""``image.make`` (build or import), ``image.verify`` and ``image.delete``."""

from __future__ import annotations

from typing import Any

import msgspec

from mica.engine import boots
from mica.engine.definition import Context, Definition, NoParams, Proposal, Step
from mica.engine.operations.vm_create import find_image
from mica.engine.records import Draft, ImageRow
from mica.engine.snapshots import draft_forget, word
from mica.model.errors import Code, MicaError
from mica.model.image import Image
from mica.model.snapshot import SnapshotKind
from mica.model.views import ImageMake
from mica.model.vm import VmSpec, check_name
from mica.ports.store import ABSENT

replace = msgspec.structs.replace


async def plan_make(proposal: Proposal) -> None:
    assert isinstance(proposal.params, ImageMake)
    name = proposal.target_name = check_name(proposal.params.recipe.name, "image name")
    if await proposal.env.records.template_names.get(name) is not None:
        raise MicaError(
            Code.EXISTS,
            f"there is a template {name} already",
            hint=f"choose another name: `mica run` takes images and templates; or delete it: "
            f"`mica template delete {name}`",
        )


class Made(msgspec.Struct, frozen=True):
    """``known``: this host had an image of that content already, so it is not ours to remove."""

    image: Image
    known: bool


async def make(context: Context) -> Made:
    recipe = context.params(ImageMake).recipe
    image = await context.env.images.make(recipe, context.report)
    return Made(image, await context.env.records.images.get(image.digest) is not None)


async def undo_make(context: Context) -> None:
    """An image is kept by content, so what was made may be what was there before: only an unrecorded one goes."""
    env = context.env
    if "make" in context.outputs:
        made = [context.output("make", Made).image]
    else:
        made = await _finished(context)
    for image in made:
        if await env.records.images.get(image.digest) is None:
            await env.images.remove(image.digest)


async def _finished(context: Context) -> list[Image]:
    """It was interrupted, perhaps when the image was complete already. Images of one name are made one by one."""
    began, name = context.operation.started_at or 0.0, context.params(ImageMake).recipe.name
    return [i for i in await context.env.images.present() if i.name == name and i.created_at >= began]


async def record(context: Context) -> str:
    """The name points at the new content; older images of that name stay while VMs use them."""
    image = context.output("make", Made).image
    row = ImageRow(image, verified_at=context.env.clock.now())

    async def write(draft: Draft) -> None:
        known = await context.env.records.images.get(image.digest)
        draft.put(context.env.records.images, image.digest, row, known.generation if known else ABSENT)

    await context.env.records.transact(write)
    return image.digest


async def undo_record(context: Context) -> None:
    made = context.output("make", Made)

    async def write(draft: Draft) -> None:
        row = await context.env.records.images.get(made.image.digest)
        if row is not None and not made.known and not await users(context, made.image.digest):
            draft.delete(context.env.records.images, made.image.digest, row.generation)

    await context.env.records.transact(write)


async def users(context: Context | Proposal, digest: str) -> list[str]:
    """Names of the VMs, those in the trash included, that stand on the image, and of templates."""
    records = context.env.records
    vms = [row.value for row in (await records.vms.scan()).values() if not row.value.hidden]
    rows = (await records.snapshots.scan()).values()
    kept = [row.value for row in rows if row.value.kind is SnapshotKind.TEMPLATE]
    return sorted(
        [*(vm.name for vm in vms if stands_on(vm.spec, digest)), *(word(s) for s in kept if stands_on(s.spec, digest))]
    )


def stands_on(spec: VmSpec, digest: str) -> bool:
    return spec.image == digest or any(d.image == digest for d in spec.disks)


async def plan_existing(proposal: Proposal) -> None:
    row = await find_image(proposal.env, proposal.target_id)
    assert row is not None
    proposal.target_id = row.image.digest
    proposal.target_name = row.image.name


async def plan_delete(proposal: Proposal) -> None:
    await plan_existing(proposal)
    _refuse_used(proposal.target_name, await users(proposal, proposal.target_id))
    held = await proposal.env.records.images.need(proposal.target_id)
    proposal.stored_params = {"row": msgspec.to_builtins(held.value)}


def _refuse_used(name: str, by: list[str]) -> None:
    if by:
        some = ", ".join(by[:5]) + (f" and {len(by) - 5} more" if len(by) > 5 else "")
        raise MicaError(
            Code.IN_USE,
            f"image {name} is used by {len(by)} VM{'s' if len(by) != 1 else ''} or templates: {some}",
            hint="delete them first, VMs with --purge (those in the trash count too)",
            details={"used_by": by},
        )


async def unrecord(context: Context) -> None:
    """From here no VM can be made from it. Creating one expects the row to be as it was, so the two cannot cross."""
    digest = context.vm_id

    async def write(draft: Draft) -> None:
        held = await context.env.records.images.get(digest)
        if held is not None:
            _refuse_used(held.value.image.name, await users(context, digest))
            for row in await boots.states(context.env):
                if stands_on(row.value.spec, digest):
                    draft_forget(context.env.records, draft, row)
            draft.delete(context.env.records.images, digest, held.generation)

    await context.env.records.transact(write)


async def undo_unrecord(context: Context) -> None:
    """If its files may be gone in part, it is shown as damaged until it has been verified."""
    row = msgspec.convert(context.operation.params["row"], ImageRow)
    if any(entry.step == "remove" for entry in context.operation.journal):
        row = replace(row, damaged="not fully deleted")

    async def write(draft: Draft) -> None:
        if await context.env.records.images.get(row.image.digest) is None:
            draft.put(context.env.records.images, row.image.digest, row, ABSENT)

    await context.env.records.transact(write)


async def remove(context: Context) -> None:
    await context.env.images.remove(context.vm_id)


async def verify(context: Context) -> None:
    row = (await context.env.records.images.need(context.vm_id)).value
    try:
        await context.env.images.verify(row.image, context.report)
    except MicaError as error:
        if error.code in (Code.CORRUPT, Code.NOT_FOUND):
            await _mark(context, error.message)
        raise
    await _mark(context, "")


async def _mark(context: Context, damaged: str) -> None:
    now = context.env.clock.now()
    await context.env.records.images.update(context.vm_id, lambda row: replace(row, verified_at=now, damaged=damaged))


def made(context: Context) -> dict[str, Any]:
    image = context.output("make", Made).image
    return {"digest": image.digest, "name": image.name}


MAKE_DEFINITION = Definition(
    verb="image.make",
    noun="image",
    params=ImageMake,
    plan=plan_make,
    steps=lambda _: (
        Step("make", make, undo_make, timeout_s=3600.0, words="making the image"),
        Step("record", record, undo_record, cancellable=False, words="adding it to the images"),
    ),
    result=made,
    creates=True,
)
DELETE_DEFINITION = Definition(
    verb="image.delete",
    noun="image",
    params=NoParams,
    plan=plan_delete,
    steps=lambda _: (
        Step("unrecord", unrecord, undo_unrecord, words="taking it from the images"),
        Step("remove", remove, cancellable=False, words="deleting its files"),
    ),
)
VERIFY_DEFINITION = Definition(
    verb="image.verify",
    noun="image",
    params=NoParams,
    plan=plan_existing,
    steps=lambda _: (Step("verify", verify, timeout_s=3600.0, words="reading all of it"),),
)
