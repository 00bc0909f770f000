from __future__ import annotations

from mica.model.mac import mac_address


def test_macs_are_local_unicast_stable_and_different() -> None:
    macs = {mac_address(vm_id, nic) for vm_id in map(str, range(500)) for nic in ("net0", "net1")}
    assert len(macs) == 1000
    assert all(len(mac) == 17 for mac in macs)
    assert all(int(mac[:2], 16) & 0xF == 2 for mac in macs)
    # VMs keep what they were given, so a change here is for new ones only; still, it is meant.
    assert mac_address("6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "net0") == "52:a9:e7:e9:15:df"
