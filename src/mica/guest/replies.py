"""What the guest agent answers, typed. Field names and meanings: QEMU's qemu-ga-ref page."""

from __future__ import annotations

import msgspec

from mica.model.units import Bytes


class CommandInfo(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    enabled: bool
    success_response: bool = True


class AgentInfo(msgspec.Struct, frozen=True):
    """``guest-info``: the agent's version and what it can do."""

    version: str
    supported_commands: tuple[CommandInfo, ...]

    @property
    def enabled(self) -> frozenset[str]:
        """Names of the commands that the agent has and the guest's policy allows."""
        return frozenset(c.name for c in self.supported_commands if c.enabled)

    @property
    def disabled(self) -> frozenset[str]:
        """Names of the commands that the agent has and the guest's policy forbids."""
        return frozenset(c.name for c in self.supported_commands if not c.enabled)


class OsInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """``guest-get-osinfo``: what is known of the system; a missing field is empty."""

    id: str = ""
    name: str = ""
    pretty_name: str = ""
    version: str = ""
    version_id: str = ""
    variant: str = ""
    machine: str = ""
    kernel_release: str = ""
    kernel_version: str = ""


class HostName(msgspec.Struct, frozen=True, rename="kebab"):
    host_name: str


class IpAddress(msgspec.Struct, frozen=True, rename="kebab"):
    """``prefix`` is the length of the network prefix in bits; ``ip_address_type`` is ``ipv4`` or ``ipv6``."""

    ip_address: str
    ip_address_type: str
    prefix: int


class NetworkInterface(msgspec.Struct, frozen=True, rename="kebab"):
    name: str
    hardware_address: str = ""
    ip_addresses: tuple[IpAddress, ...] = ()


class GuestUser(msgspec.Struct, frozen=True, rename="kebab"):
    """A user with a session; ``login_time`` is Unix time in seconds."""

    user: str
    login_time: float
    domain: str = ""


class FileSystem(msgspec.Struct, frozen=True, rename="kebab"):
    """A mounted file system; sizes in bytes where the agent knows them."""

    name: str
    mountpoint: str
    type: str
    used_bytes: Bytes | None = None
    total_bytes: Bytes | None = None


class ExecPid(msgspec.Struct, frozen=True):
    pid: int


class ExecStatus(msgspec.Struct, frozen=True, rename="kebab"):
    """``guest-exec-status``. Once it says ``exited``, the agent forgets the process: it never says so twice."""

    exited: bool
    exitcode: int | None = None
    signal: int | None = None
    out_data: bytes = b""
    err_data: bytes = b""
    out_truncated: bool = False
    err_truncated: bool = False


class FileRead(msgspec.Struct, frozen=True, rename="kebab"):
    count: int
    eof: bool
    buf_b64: bytes = b""


class FileWrite(msgspec.Struct, frozen=True):
    count: int
    eof: bool


class FileSeek(msgspec.Struct, frozen=True):
    position: int
    eof: bool


class VcpuStats(msgspec.Struct, frozen=True, rename="kebab"):
    logical_id: int
    online: bool
    can_offline: bool = False
