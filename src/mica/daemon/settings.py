"""Settings of a daemon: from its command line, the environment and ``MICA_HOME/config.toml``, in that order.

This is the only module that reads the environment. ``docs/reference/settings.md`` is generated from the table below.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from mica.model.errors import invalid
from mica.model.paths import runtime_dir, state_home
from mica.model.units import GIB, MIB, parse_duration, parse_size

CONFIG_NAME = "config.toml"

# Name → what it is for. Each is a key of config.toml, a variable ``MICA_<NAME>`` and an option ``--<name>``.
SETTINGS: dict[str, str] = {
    "listen": "also serve the API on TCP, as ADDRESS:PORT; loopback addresses only, with the token in MICA_HOME/token",
    "qemu": "the QEMU binary to use instead of qemu-system-x86_64 on PATH",
    "passt": "the passt binary to use instead of the system's, by its path",
    "slirp": "allow lets root too use QEMU's own user mode where passt cannot be had, refuse lets nobody; guests reach "
    "the host's loopback through it",
    "accelerator": "kvm or tcg instead of the best one that is proven to work",
    "jail": "off runs QEMU without a jail; refused to root",
    "reserve": "memory that VMs never get; the larger of 512 MiB and 5 % of the host if not given",
    "trash": "how long deleted VMs can be restored; 7d if not given",
    "keep_operations": "how long ended operations are kept; 30d if not given",
    "scrub": "bytes per second at which parts of snapshots are read again, to find damage; 32M if not given, 0: never",
    "boot_once": "true: VMs begin where their image had booted before; false: each of them boots; true if not given",
    "boot_space": "disk for the states of images that were booted once; the smaller of 8 GiB and a tenth of the file "
    "system if not given",
    "log_level": "debug, info, warning or error; info if not given",
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All a daemon needs to know before it looks at the host. Sizes in bytes, times in seconds.

    ``session`` is what systemd's tools need of the environment to find this user's manager.
    """

    home: Path
    runtime_dir: Path
    path: str
    session: dict[str, str] = {}
    uid: int
    listen: tuple[str, int] | None = None
    qemu: str = ""
    passt: str = ""
    slirp: str = ""
    accelerator: str = ""
    jail_off: bool = False
    reserve: int | None = None
    trash_s: float = 7 * 86400.0
    keep_operations_s: float = 30 * 86400.0
    scrub_rate: int = 32 * MIB
    boot_once: bool = True
    boot_space: int | None = None
    log_level: str = "info"

    @property
    def api_socket(self) -> Path:
        return self.runtime_dir / "api.sock"

    @property
    def log_dir(self) -> Path:
        return self.home / "logs"

    @property
    def token_file(self) -> Path:
        return self.home / "token"


def _listen(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if host not in ("127.0.0.1", "::1", "localhost") or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise invalid(
            f"cannot listen on {text!r}",
            hint="write 127.0.0.1:PORT or [::1]:PORT; without sign-in nothing but loopback is served",
        )
    return host, int(port)


def _from_file(home: Path) -> dict[str, Any]:
    file = home / CONFIG_NAME
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise invalid(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise invalid(f"{file} is not TOML: {error}") from error
    unknown = values.keys() - SETTINGS.keys()
    if unknown:
        raise invalid(
            f"{file} has unknown settings: {', '.join(sorted(unknown))}", hint=f"there are: {', '.join(SETTINGS)}"
        )
    return {key: str(value) for key, value in values.items()}


def load(options: Mapping[str, str], environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Settings:
    """Settings from ``options`` (the command line), ``environ`` and the file. Raises ``invalid`` naming the setting."""
    uid = os.geteuid() if uid is None else uid
    home = Path(options["home"]).absolute() if options.get("home") else state_home(environ, uid)
    values = _from_file(home)
    values |= {key: value for key in SETTINGS if (value := environ.get(f"MICA_{key.upper()}"))}
    values |= {key: value for key, value in options.items() if key in SETTINGS and value}
    runtime = runtime_dir(home, environ, uid)
    if values.get("jail", "on") not in ("on", "off"):
        raise invalid(f"jail is {values['jail']!r}", hint="on or off")
    if values.get("accelerator", "") not in ("", "kvm", "tcg"):
        raise invalid(f"accelerator is {values['accelerator']!r}", hint="kvm or tcg")
    if values.get("slirp", "") not in ("", "allow", "refuse"):
        raise invalid(f"slirp is {values['slirp']!r}", hint="allow or refuse")
    if Path(values.get("passt") or "passt").name != "passt":
        raise invalid(f"passt is {values['passt']!r}", hint="the path of a program named passt")
    if values.get("boot_once", "true").lower() not in ("true", "false"):
        raise invalid(f"boot_once is {values['boot_once']!r}", hint="true or false")
    if values.get("log_level", "info") not in ("debug", "info", "warning", "error"):
        raise invalid(f"log_level is {values['log_level']!r}", hint="debug, info, warning or error")
    return Settings(
        home=home,
        runtime_dir=runtime,
        path=environ.get("PATH", os.defpath),
        session={k: environ[k] for k in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS") if k in environ},
        uid=uid,
        listen=_listen(values["listen"]) if values.get("listen") else None,
        qemu=values.get("qemu", ""),
        passt=values.get("passt", ""),
        slirp=values.get("slirp", ""),
        accelerator=values.get("accelerator", ""),
        jail_off=values.get("jail") == "off",
        reserve=parse_size(values["reserve"]) if values.get("reserve") else None,
        trash_s=parse_duration(values.get("trash", "7d")),
        keep_operations_s=parse_duration(values.get("keep_operations", "30d")),
        scrub_rate=parse_size(values.get("scrub", "32M")),
        boot_once=values.get("boot_once", "true").lower() == "true",
        boot_space=parse_size(values["boot_space"]) if values.get("boot_space") else None,
        log_level=values.get("log_level", "info"),
    )


def default_boot_space(disk: int) -> int:
    """Bytes of a file system of that size for states of images that were booted once."""
    return min(8 * GIB, disk // 10)


def default_warm(memory: int) -> int:
    """Bytes in which RAM images that nothing maps are kept for the next VM that begins there."""
    return min(1 * GIB, memory // 16)


def default_reserve(memory: int) -> int:
    """Bytes kept for the host itself: its kernel, its services and the daemon."""
    return max(512 * MIB, memory // 20) if memory > 2 * GIB else memory // 4
