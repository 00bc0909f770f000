"""An initial RAM file system as an archive in cpio's "newc" format (Linux, driver-api/early-userspace/buffer-format).

Written here rather than by cpio(1), because device nodes need no privilege this way and two builds of the same content
are the same bytes.
"""

from __future__ import annotations

import stat
from typing import BinaryIO

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """``mode`` has type and permissions as in stat(2); ``data`` is the content, or the target of a symbolic link."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(permissions: int = 0o755) -> Entry:
    return Entry(stat.S_IFDIR | permissions)


def regular(data: bytes | str, permissions: int = 0o644) -> Entry:
    return Entry(stat.S_IFREG | permissions, data.encode() if isinstance(data, str) else data)


def symlink(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def character_device(major: int, minor: int, permissions: int) -> Entry:
    return Entry(stat.S_IFCHR | permissions, device=(major, minor))


def write(file: BinaryIO, entries: dict[str, Entry]) -> None:
    """Write ``entries`` (path without leading slash → entry), sorted, owned by root, dated 1970.

    Directories that are only implied by a path are added.
    """
    complete = dict(entries)
    for path in entries:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            complete.setdefault("/".join(parts[:depth]), directory())
    for number, path in enumerate(sorted(complete), start=1):
        _write_entry(file, number, path, complete[path])
    _write_entry(file, 0, "TRAILER!!!", Entry(0))


def _write_entry(file: BinaryIO, inode: int, path: str, entry: Entry) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    file.write(_padded(header + name))
    file.write(_padded(entry.data))


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
