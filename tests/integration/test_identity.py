"""A real guest becomes another machine, told by its agent."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from mica.client import Client
from mica.guest.agent import GuestAgent
from mica.guest.guests import AgentGuests
from mica.guest.identity import AgentIdentities
from mica.guest.script import PATH
from mica.model.identity import FIRST, REST, Identity, Report, Trait
from mica.model.vm import ProcessRef, VmRuntime
from tests.integration.conftest import create
from tests.integration.world import World

pytestmark = pytest.mark.guest

PARENT = "0f1e2d3c-0000-4000-8000-000000000001"
CHILD = "0f1e2d3c-0000-4000-8000-000000000002"
NEW = "52:54:00:aa:bb:cc"
LATER = 2_000_000_000.0

# A guest that has everything, as far as the scripts look. Its ssh-keygen makes no keys, or none at all.
FURNISH = f"""
echo {PARENT.replace("-", "")} >/etc/machine-id
mkdir -p /var/lib/dbus /etc/ssh /var/lib/systemd /usr/local/bin /var/lib/cloud/data /run/cloud-init /etc/netplan
mkdir -p /var/lib/cloud/instances/{PARENT}/sem /var/log/journal/{PARENT.replace("-", "")}
cp /etc/machine-id /var/lib/dbus/machine-id
for t in rsa ed25519; do
  echo "old $t" >/etc/ssh/ssh_host_${{t}}_key; echo "old $t" >/etc/ssh/ssh_host_${{t}}_key.pub
  chmod 600 /etc/ssh/ssh_host_${{t}}_key
done
cat >/usr/local/bin/ssh-keygen <<'END'
#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -t) t=$2 ;; -f) f=$2 ;; esac
  shift
done
[ -e /etc/ssh/broken ] && exit 1
read -r n </proc/sys/kernel/random/uuid
echo "new $t $n" >$f
echo "new $t $n" >$f.pub
END
chmod 755 /usr/local/bin/ssh-keygen
sh -c 'trap "echo heard >/run/heard" HUP; while :; do sleep 0.1; done' >/dev/null 2>&1 &
echo $! >/run/sshd.pid
head -c 32 /dev/zero >/var/lib/systemd/random-seed
echo {PARENT} >/var/lib/cloud/data/instance-id
echo done >/var/lib/cloud/instances/{PARENT}/sem/config_ssh
ln -s /var/lib/cloud/instances/{PARENT} /var/lib/cloud/instance
echo {PARENT} >/run/cloud-init/.instance-id
echo '{{"id": "{PARENT}"}}' >/run/cloud-init/instance-data.json
touch /run/cloud-init/result.json
echo "127.0.1.1 micro.example micro other" >>/etc/hosts
echo "macaddress: OLD" >/etc/netplan/50.yaml
"""


class Guest:
    """A guest whose daemon is gone, so that its agent is free to speak with this test."""

    def __init__(self, guests: AgentGuests, vm_id: str, runtime: VmRuntime) -> None:
        self.agent: GuestAgent = guests.agent(vm_id, "the guest", runtime)
        self.identities = AgentIdentities(guests, now=lambda: LATER, first_timeout_s=60.0)
        self.vm_id, self.runtime = vm_id, runtime

    async def run(self, text: str) -> str:
        pid = await self.agent.exec_raw("/bin/sh", ["-c", text], env=[f"PATH={PATH}"])
        status = await self.agent.exec_wait(pid, timeout_s=60)
        assert status.exitcode == 0, (text, status)
        return status.out_data.decode().strip()

    async def prepare(self) -> bool:
        return await self.identities.prepare(self.vm_id, self.runtime)

    async def first(self, identity: Identity) -> Report:
        return await self.identities.first(self.vm_id, self.runtime, identity)

    async def rest(self, identity: Identity) -> Report:
        return await self.identities.rest(self.vm_id, self.runtime, identity)


@pytest.fixture
async def guest(world: World, client: Client) -> AsyncIterator[Guest]:
    vm = await (await create(client)).start()
    await vm.wait_agent(timeout_s=90)
    (socket,) = (world.runtime / "vm" / vm.id).rglob("agent")
    world.kill()
    spec = vm.view.spec
    runtime = VmRuntime(
        process=ProcessRef(1, 1, ""), spec=spec, run_dir=str(socket.parent), accelerator="", started_at=0.0
    )
    guests = AgentGuests()
    made = Guest(guests, vm.id, runtime)
    await made.agent.wait_ready(60)
    yield made
    await guests.close()


def undone(report: Report) -> dict[Trait, str]:
    return {item.what: item.why for item in report if not item.done}


async def test_a_guest_becomes_another_machine(guest: Guest) -> None:
    old = await guest.run("cat /sys/class/net/eth0/address")
    who = Identity(id=CHILD, parent_id=PARENT, hostname="twin", macs={old: NEW})

    # Before anything else: generator, clock, MAC address; with and without a program that waits for it.
    for prepare in (False, True, True):
        if prepare:
            assert await guest.prepare()
        report = await guest.first(who)
        assert tuple(item.what for item in report) == FIRST
        assert undone(report) == {}
    assert await guest.run("cat /sys/class/net/eth0/address") == NEW
    assert abs(int(await guest.run("date +%s")) - LATER) < 60
    assert await guest.run("ls -A /dev/shm; ls -d /run/mica-identity-* 2>/dev/null; true") == ""
    waiting = "for p in /proc/[0-9]*/comm; do read -r c <$p; echo $c; done 2>/dev/null | grep -c ^mica-ident"
    assert await guest.run(waiting) == "1"
    strange = Identity(id=CHILD, macs={"52:54:00:00:00:01": "52:54:00:00:00:02", NEW: old})
    assert undone(await guest.first(strange)) == {
        Trait.MAC: "52:54:00:00:00:02: no NIC that can be changed has 52:54:00:00:00:01"
    }
    assert await guest.run("cat /sys/class/net/eth0/address") == old
    await guest.run("kill $(cat /run/mica.identity/pid)")
    assert undone(await guest.first(who)) == {}
    assert await guest.run("cat /sys/class/net/eth0/address") == NEW

    # The rest, where there is nothing but a name and an address.
    report = await guest.rest(who)
    assert tuple(item.what for item in report) == (*REST, Trait.PROGRAMS, Trait.FIRMWARE)
    assert set(undone(report)) == {Trait.PROGRAMS, Trait.FIRMWARE}
    assert await guest.run("hostname; cat /etc/hostname; grep -c twin /etc/hosts; pidof udhcpc | wc -w") == (
        "twin\ntwin\n1\n1"
    )
    assert "inet " in await guest.run("ip -4 addr show dev eth0")
    link_local = await guest.run("ip -6 addr show dev eth0 scope link | grep inet6")
    assert link_local.split()[1] == "fe80::5054:ff:feaa:bbcc/64"

    # Everything, and a generator of keys that fails at first.
    await guest.run("echo micro >/proc/sys/kernel/hostname; " + FURNISH.replace("OLD", old))
    await guest.run("touch /etc/ssh/broken")
    assert undone(await guest.rest(who))[Trait.HOST_KEYS] == (
        "no new ones could be made for ssh_host_ed25519_key ssh_host_rsa_key"
    )
    assert await guest.run("cat /etc/ssh/*_key; ls -A /etc/ssh | wc -l") == "old ed25519\nold rsa\n5"
    await guest.run("rm /etc/ssh/broken")
    await check_furnished(guest, who, old)


async def check_furnished(guest: Guest, who: Identity, old: str) -> None:
    assert set(undone(await guest.rest(who))) == {Trait.PROGRAMS, Trait.FIRMWARE}
    machine_id = CHILD.replace("-", "")
    assert await guest.run("cat /etc/machine-id /var/lib/dbus/machine-id; ls /var/log/journal") == "\n".join(
        [machine_id] * 3
    )
    keys = await guest.run("cat /etc/ssh/*_key /etc/ssh/*.pub; stat -c %a /etc/ssh/*_key; ls -A /etc/ssh | wc -l")
    lines = keys.splitlines()
    assert [line[:7] for line in lines[:2]] == ["new ed2", "new rsa"]
    assert lines[2:] == [*lines[:2], "600", "600", "4"]
    give_up = time.monotonic() + 30
    while await guest.run("cat /run/heard 2>/dev/null; true") != "heard":
        assert time.monotonic() < give_up, "the SSH server was not told of its new keys"
    cloud = "cat data/instance-id data/previous-instance-id instance/sem/config_ssh; readlink instance"
    instance = f"/var/lib/cloud/instances/{CHILD}"
    assert await guest.run(f"cd /var/lib/cloud; {cloud}") == f"{CHILD}\n{PARENT}\ndone\n{instance}"
    assert CHILD in await guest.run("cat /run/cloud-init/instance-data.json")
    assert await guest.run("cat /run/cloud-init/.instance-id") == CHILD
    assert await guest.run("grep 127.0.1.1 /etc/hosts | tail -n 1") == "127.0.1.1 twin.example twin other"
    assert await guest.run("cat /etc/netplan/50.yaml") == f"macaddress: {NEW}"
    assert await guest.run("tr -d '\\0' </var/lib/systemd/random-seed | wc -c") != "0"
    # Once more changes nothing that somebody may rely on by now.
    assert set(undone(await guest.rest(who))) == {Trait.PROGRAMS, Trait.FIRMWARE}
    again = await guest.run("cat /etc/ssh/*_key /etc/ssh/*.pub; stat -c %a /etc/ssh/*_key; ls -A /etc/ssh | wc -l")
    assert again == keys
    # A copy of the copy has keys of its own; an instance that is not the machine's own stays.
    await guest.run("echo seed-disk >/var/lib/cloud/data/instance-id")
    report = await guest.rest(Identity(id=PARENT, parent_id=CHILD, macs=who.macs))
    assert await guest.run("cat /etc/ssh/*_key") not in keys
    (cloud_init,) = [item for item in report if item.what is Trait.CLOUD_INIT]
    assert (cloud_init.done, "seed-disk" in cloud_init.why) == (True, True)
    assert await guest.run("hostname; cat /var/lib/cloud/data/instance-id") == "twin\nseed-disk"
