"""States of images that were booted once."""

from __future__ import annotations

import msgspec

from mica.model.vm import VmSpec


class Boot(msgspec.Struct, frozen=True):
    """Somebody had to boot a machine of this shape: a state for the next one is wished for.

    ``vm_id`` is the hidden VM that boots it now. ``failures`` in a row, the last one at ``failed_at`` for the reason
    ``why``. Times are Unix seconds.
    """

    spec: VmSpec
    image_name: str
    wished_at: float
    vm_id: str = ""
    failures: int = 0
    failed_at: float = 0.0
    why: str = ""
