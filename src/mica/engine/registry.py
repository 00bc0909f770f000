"""Every verb the engine has. A verb that is not here does not exist; the crash harness walks this list."""

from __future__ import annotations

from mica.engine.definition import Definition
from mica.engine.operations import (
    image_make,
    schedule,
    snapshot_create,
    snapshot_delete,
    snapshot_restore,
    vm_create,
    vm_delete,
    vm_pause,
    vm_restart,
    vm_set,
    vm_start,
    vm_stop,
    vm_suspend,
)

DEFINITIONS: dict[str, Definition] = {
    definition.verb: definition
    for definition in (
        vm_create.DEFINITION,
        vm_start.DEFINITION,
        vm_stop.DEFINITION,
        vm_restart.DEFINITION,
        vm_pause.PAUSE_DEFINITION,
        vm_pause.RESUME_DEFINITION,
        vm_suspend.SUSPEND_DEFINITION,
        vm_suspend.DISCARD_DEFINITION,
        vm_set.DEFINITION,
        vm_delete.DELETE_DEFINITION,
        vm_delete.RESTORE_DEFINITION,
        vm_delete.PURGE_DEFINITION,
        snapshot_create.DEFINITION,
        snapshot_restore.DEFINITION,
        snapshot_delete.DELETE_DEFINITION,
        snapshot_delete.SET_DEFINITION,
        snapshot_delete.VERIFY_DEFINITION,
        schedule.CREATE_DEFINITION,
        schedule.DELETE_DEFINITION,
        image_make.MAKE_DEFINITION,
        image_make.DELETE_DEFINITION,
        image_make.VERIFY_DEFINITION,
    )
}
