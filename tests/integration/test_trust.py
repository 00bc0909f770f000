"""Snapshots that can be trusted, on real guests."""

from __future__ import annotations

import pytest

from mica.client.handle import VmHandle

pytestmark = pytest.mark.guest


async def test_a_quiesced_guest_goes_on(booted: VmHandle) -> None:
    taken = await booted.snapshot("still", quiesce=True)
    assert taken.snapshot.quiesced
    # Its agent refuses commands while file systems are frozen.
    result = await booted.exec("echo", "thawed")
    assert result.stdout == b"thawed\n"
    again = await booted.snapshot("again", quiesce=True, memory=False)
    assert again.snapshot.quiesced
    await booted.restore_snapshot("still", keep=False)
    result = await booted.exec("echo", "here")
    assert result.stdout == b"here\n"
