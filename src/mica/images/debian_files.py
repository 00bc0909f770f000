"""The files of the Debian image that are ours: how it boots, finds its network, grows, and becomes a new machine."""

from __future__ import annotations

import msgspec

from mica.images.sources import Source

# Of systemd's suite, the parts that Debian packages on their own; what a machine in a hypervisor and its
# administrator need. Chosen so that the image is a plain, small Debian server.
PACKAGES = (
    "ca-certificates",
    "cloud-init",
    "dbus",
    "dosfstools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "netbase",
    "openssh-server",
    "procps",
    "qemu-guest-agent",
    "sudo",
    "systemd-boot",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
    "vim-tiny",
    "wget",
    "zstd",
)
# In Debian 12 a part of the package systemd.
SPLIT_OFF_LATER = ("systemd-repart",)

# What an initial RAM file system needs to find a root disk on any bus that QEMU has.
INITRAMFS_MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "sd_mod", "ahci", "nvme", "ext4")
INITRAMFS_CONF = "MODULES=list\nCOMPRESS=zstd\nBUSYBOX=auto\n"

# Left out of the image: what every machine must make for itself, and what the build leaves behind.
DROPPED = (
    "./dev/*",
    # Checks snapshots on LVM, which this image has not; costs a second of every emulated boot.
    "./etc/systemd/system/multi-user.target.wants/e2scrub_reap.service",
    "./etc/systemd/system/timers.target.wants/e2scrub_all.timer",
    "./etc/apt/apt.conf.d/99mmdebstrap",
    "./etc/apt/sources.list",
    "./etc/apt/sources.list.d/*",
    "./etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "./etc/ssh/ssh_host_*",
    "./initrd.img.old",
    "./var/cache/apt/*.bin",
    "./var/cache/apt/archives/*.deb",
    "./var/cache/debconf/*-old",
    "./var/lib/apt/lists/*",
    "./var/lib/dpkg/*-old",
    "./var/lib/systemd/random-seed",
    "./var/log/*.log",
    "./var/log/apt/*",
    "./vmlinuz.old",
)

CONSOLE_POLICY = "root is logged in on the serial console; no account has a password; SSH by key"

NETWORK = """\
# Any Ethernet-like interface, whatever its MAC address: an address by DHCP.
[Match]
Name=en* eth*

[Network]
DHCP=yes

[DHCPv4]
ClientIdentifier=mac
"""

# One interface with an address is enough to call the network up, and half a minute enough to wait for it.
WAIT_ONLINE = """\
[Service]
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=30
"""

REPART_ROOT = """\
# The root partition takes the whole of a disk that has grown; the file system follows (x-systemd.growfs in fstab).
[Partition]
Type=root
"""

HOST_KEYS_SERVICE = """\
[Unit]
Description=Make this machine's SSH host keys
Before=ssh.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
ExecStart=/usr/bin/ssh-keygen -q -t ecdsa -N "" -f /etc/ssh/ssh_host_ecdsa_key

[Install]
WantedBy=ssh.service
"""

AUTOLOGIN = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 - $TERM
"""

# With three entries cloud-init looks for a seed and stays out of the way when there is none; two would be taken as
# given (cloud-init, tools/ds-identify).
CLOUD_INIT = """\
datasource_list: [NoCloud, ConfigDrive, None]
ssh_genkeytypes: [ed25519, ecdsa]
growpart: {mode: "off"}
resize_rootfs: false
"""

LOADER_CONF = "timeout 0\nconsole-mode keep\neditor no\n"
# Names below the ESP; Debian's systemd-boot calls its entries after this token (kernel-install(8)).
ENTRY_TOKEN = "debian"  # noqa: S105 - a name

_UNITS = "lib/systemd/system"


class Identity(msgspec.Struct, frozen=True):
    """What tells this disk from others: UUIDs of the partition table, its partitions and the root file system.

    ``esp_serial`` is the serial number of the FAT, as 8 hexadecimal digits; ``entries`` is what boot loader entries of
    this disk have for a machine id, 32 digits.
    """

    disk: str
    esp_partition: str
    root_partition: str
    root: str
    esp_serial: str
    entries: str


def kernel_cmdline(identity: Identity) -> str:
    """The serial console last, so that it is the one that /dev/console means."""
    return f"root=UUID={identity.root} rw console=tty0 console=ttyS0,115200 quiet"


def loader_entry(identity: Identity, kernel: str, title: str) -> str:
    """A Boot Loader Specification entry just as kernel-install(8) makes them inside, so that they sort as one list.

    Entries are ordered by sort-key, then by machine id, then newest first (systemd-boot(7)). The machine has no id
    yet, so ``install.conf`` gives kernel-install the same one to write as we do here; it serves nothing else.
    """
    folder = f"/{ENTRY_TOKEN}/{kernel}"
    return (
        f"title      {title}\n"
        f"version    {kernel}\n"
        f"machine-id {identity.entries}\n"
        "sort-key   debian\n"
        f"options    {kernel_cmdline(identity)}\n"
        f"linux      {folder}/linux\n"
        f"initrd     {folder}/initrd.img-{kernel}\n"
    )


def files(identity: Identity, hostname: str, sources: tuple[Source, ...]) -> dict[str, str]:
    """Path → content."""
    serial = f"{identity.esp_serial[:4]}-{identity.esp_serial[4:]}".upper()
    return {
        "etc/apt/sources.list.d/debian.sources": "\n".join(_guest_source(source) for source in sources),
        "etc/cloud/cloud.cfg.d/90_mica.cfg": CLOUD_INIT,
        "etc/default/locale": "LANG=C.UTF-8\n",
        "etc/fstab": (
            f"UUID={identity.root} / ext4 defaults,errors=remount-ro,x-systemd.growfs 0 1\n"
            f"UUID={serial} /boot/efi vfat umask=0077,nofail,noauto,x-systemd.automount,x-systemd.idle-timeout=60 0 2\n"
        ),
        "etc/hostname": f"{hostname}\n",
        "etc/hosts": (
            f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n"
            "::1 localhost ip6-localhost ip6-loopback\nff02::1 ip6-allnodes\nff02::2 ip6-allrouters\n"
        ),
        "etc/initramfs-tools/conf.d/mica": INITRAMFS_CONF,
        "etc/kernel/cmdline": kernel_cmdline(identity) + "\n",
        "etc/kernel/entry-token": f"{ENTRY_TOKEN}\n",
        "etc/kernel/install.conf": f"layout=bls\nBOOT_ROOT=/boot/efi\nMACHINE_ID={identity.entries}\n",
        "etc/machine-id": "",
        "etc/repart.d/50-root.conf": REPART_ROOT,
        "etc/systemd/network/80-dhcp.network": NETWORK,
        "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf": AUTOLOGIN,
        "etc/systemd/system/ssh-host-keys.service": HOST_KEYS_SERVICE,
        "etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf": WAIT_ONLINE,
    }


def links() -> dict[str, str]:
    """Path → target of symbolic links: the units that start, as ``systemctl enable`` would link them."""
    system = "etc/systemd/system"
    return {
        f"{system}/dbus-org.freedesktop.network1.service": f"/{_UNITS}/systemd-networkd.service",
        f"{system}/multi-user.target.wants/systemd-networkd.service": f"/{_UNITS}/systemd-networkd.service",
        f"{system}/network-online.target.wants/systemd-networkd-wait-online.service": (
            f"/{_UNITS}/systemd-networkd-wait-online.service"
        ),
        f"{system}/sockets.target.wants/systemd-networkd.socket": f"/{_UNITS}/systemd-networkd.socket",
        f"{system}/ssh.service.wants/ssh-host-keys.service": "/etc/systemd/system/ssh-host-keys.service",
        "var/lib/dbus/machine-id": "/etc/machine-id",
    }


def _guest_source(source: Source) -> str:
    """The machine's own source: with the key that it has itself, where the host's is one of Debian's."""
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    debians = not source.signed_by or all("debian-archive" in path for path in source.signed_by.split())
    inline = "BEGIN PGP" in source.signed_by
    signed_by = keyring if debians else source.signed_by if inline else ""
    return msgspec.structs.replace(source, signed_by=signed_by).stanza()
