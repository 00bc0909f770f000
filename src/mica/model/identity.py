"""What makes one machine itself and not the machine that it was copied from."""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

MAX_NICS = 32
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_ID = re.compile(r"[A-Za-z0-9-]{0,64}")


class Trait(StrEnum):
    """What a copy shares with its original until it is changed. ``programs``: random generators inside programs of the
    guest, which nobody can reach. ``firmware``: the UUID that the firmware left in the guest's memory."""

    RANDOM = "random"
    MAC = "mac"
    CLOCK = "clock"
    HOSTNAME = "hostname"
    MACHINE_ID = "machine-id"
    HOST_KEYS = "ssh-host-keys"
    CLOUD_INIT = "cloud-init"
    ADDRESS = "address"
    SEED_FILE = "random-seed-file"
    PROGRAMS = "programs"
    FIRMWARE = "firmware"


FIRST = (Trait.RANDOM, Trait.CLOCK, Trait.MAC)
REST = (Trait.HOSTNAME, Trait.MACHINE_ID, Trait.ADDRESS, Trait.HOST_KEYS, Trait.CLOUD_INIT, Trait.SEED_FILE)


class IdentityItem(msgspec.Struct, frozen=True):
    """One trait: whether the copy has its own now, and why not, or what to know of it."""

    what: Trait
    done: bool
    why: str = ""


Report = tuple[IdentityItem, ...]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who a copy is to be.

    ``id`` is the VM's id (a UUID): its machine id and cloud-init instance are made from it, so that doing it twice
    changes nothing the second time. ``parent_id`` is the id of the VM whose state it began with. ``macs`` maps the
    addresses of NICs as they are in that state to the new ones, lower case with colons; an empty ``hostname`` stays.
    """

    id: str
    parent_id: str = ""
    hostname: str = ""
    macs: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Raises ``ValueError``: all of it becomes part of scripts."""
        if len(self.macs) > MAX_NICS:
            raise ValueError(f"{len(self.macs)} NICs, at most {MAX_NICS}")
        macs = [mac for pair in self.macs.items() for mac in pair]
        wrong = [mac for mac in macs if not MAC.fullmatch(mac)]
        wrong += [text for text in (self.id, self.parent_id) if not _ID.fullmatch(text)]
        if self.hostname and not _HOSTNAME.fullmatch(self.hostname):
            wrong.append(self.hostname)
        if wrong:
            raise ValueError(f"not fit for an identity: {wrong[0]!r}")


def undone(traits: tuple[Trait, ...], why: str) -> Report:
    """None of ``traits`` was changed."""
    return tuple(IdentityItem(trait, False, why) for trait in traits)
