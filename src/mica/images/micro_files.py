"""The files of the micro guest that are ours: its first process's table, its scripts, its users.

busybox init is process 1 (it reaps orphans, respawns, and powers off in order). Boot is cut to what the guest agent
needs; everything else starts beside it.
"""

from __future__ import annotations

# Loaded before the agent starts; what they depend on comes with them. Everything else is loaded by need. A disk is
# there when the agent answers, because what the agent is first asked to do may need it.
EARLY_MODULES = ("virtio_pci", "virtio_console", "virtio_blk")

# In the image; loaded when a device asks for it (by its alias) or a person does. Those a kernel lacks are left out.
MODULES = (
    *EARLY_MODULES,
    "virtio_net",
    "virtio_blk",
    "virtio_scsi",
    "virtio_balloon",
    "virtio_rng",
    "virtio_mmio",
    "virtio_mem",
    "virtio_input",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "vmgenid",
    "sd_mod",
    "sr_mod",
    "button",
    "evdev",
    "qemu_fw_cfg",
    "overlay",
    "squashfs",
    "isofs",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_utf8",
)

INITTAB = """\
::sysinit:/etc/init.d/early
::respawn:/sbin/agent
::once:/etc/init.d/late
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/shutdown -r
::shutdown:/bin/umount -a -r
"""

EARLY = """\
#!/bin/sh
# All that the agent needs, in as few processes as can be: each costs 10 ms where the processor is emulated.
mount -a
mkdir -p /dev/pts /dev/shm
mount -a -T /etc/fstab.dev
read -r line < /proc/cmdline
for word in $line; do
  case $word in
    mica.hostname=*) echo "${word#*=}" > /etc/hostname ;;
  esac
done
read -r name < /etc/hostname && echo "$name" > /proc/sys/kernel/hostname
modprobe -q -a EARLY_MODULES
"""

FSTAB = """\
proc /proc proc nosuid,nodev,noexec 0 0
sys /sys sysfs nosuid,nodev,noexec 0 0
dev /dev devtmpfs nosuid,mode=0755 0 0
run /run tmpfs nosuid,nodev,mode=0755 0 0
tmp /tmp tmpfs nosuid,nodev,mode=1777 0 0
"""

FSTAB_DEV = """\
pts /dev/pts devpts gid=5,mode=0620,ptmxmode=0666 0 0
shm /dev/shm tmpfs nosuid,nodev,mode=1777 0 0
"""

# The network never delays the agent: all of this runs beside it.
LATE = """\
#!/bin/sh
ip link set lo up
# Drivers for the devices that are there, then mdev for those that come.
cat /sys/bus/pci/devices/*/modalias /sys/bus/virtio/devices/*/modalias /sys/bus/acpi/devices/*/modalias 2>/dev/null \\
  | sort -u | xargs modprobe -q -a -b
cat /sys/bus/virtio/devices/*/modalias 2>/dev/null | sort -u | xargs modprobe -q -a -b
# What hangs on a SCSI bus announces itself to nobody yet.
[ -d /sys/module/scsi_mod ] && modprobe -q -a sd_mod sr_mod
mdev -d
for path in /sys/class/net/eth*; do
  [ -e "$path" ] && /sbin/nic add "${path##*/}"
done
modprobe -q -a evdev button
# The power button is an input device; busybox's acpid turns it into the script below /etc/acpi.
exec acpid -f -l /dev/null -p /run/acpid.pid
"""

MDEV_CONF = """\
$MODALIAS=.* 0:0 660 @modprobe -q -b "$MODALIAS"
-SUBSYSTEM=net;eth[0-9]+ 0:0 600 */sbin/nic "$ACTION" "$INTERFACE"
null 0:0 666
zero 0:0 666
full 0:0 666
random 0:0 666
urandom 0:0 666
tty 0:5 666
ptmx 0:5 666
"""

NIC = """\
#!/bin/sh
# nic add|remove|renew INTERFACE: an address by DHCP for every network interface, also one that is plugged in later.
# "renew" asks anew, which is right after the interface got another MAC address.
pid=/run/udhcpc.$2.pid
case $1 in
  add)
    mkdir "/run/nic.$2" 2>/dev/null || exit 0
    ip link set "$2" up
    setsid udhcpc -f -i "$2" -p "$pid" -s /etc/udhcpc/script -t 5 -T 1 -A 5 -x "hostname:$(hostname)" \\
      </dev/null >/dev/null 2>&1 &
    ;;
  remove)
    [ -e "$pid" ] && kill "$(cat "$pid")"
    rmdir "/run/nic.$2" 2>/dev/null
    ;;
  renew)
    [ -e "$pid" ] || exit 1
    ip link set "$2" up
    kill -USR2 "$(cat "$pid")"
    kill -USR1 "$(cat "$pid")"
    ;;
esac
"""

UDHCPC_SCRIPT = """\
#!/bin/sh
# Called by udhcpc with what the DHCP server said. The route comes last: when it is there, all is.
case $1 in
  deconfig)
    ip addr flush dev "$interface"
    ip link set "$interface" up
    ;;
  bound|renew)
    if [ -n "$dns" ]; then
      {
        [ -n "$domain" ] && echo "search $domain"
        for server in $dns; do echo "nameserver $server"; done
      } > /etc/resolv.conf.new
      mv /etc/resolv.conf.new /etc/resolv.conf
    fi
    ip addr replace "$ip/${mask:-24}" ${broadcast:+broadcast "$broadcast"} dev "$interface"
    metric=$(cat "/sys/class/net/$interface/ifindex")
    for gateway in $router; do
      ip route replace default via "$gateway" dev "$interface" metric "$metric"
      break
    done
    ;;
esac
"""

AGENT = """\
#!/bin/sh
# There is no udev to make /dev/virtio-ports, so the port is found by the name that the host gave it.
# Ports appear some time after their driver; nothing but sysfs tells when.
tries=0
while :; do
  for port in /sys/class/virtio-ports/*; do
    if read -r name 2>/dev/null < "$port/name" && [ "$name" = org.qemu.guest_agent.0 ]; then
      exec /usr/sbin/qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run
    fi
  done
  tries=$((tries + 1))
  if [ $tries -lt 200 ]; then usleep 20000; else sleep 5; fi
done
"""

# The agent's guest-shutdown runs "/sbin/shutdown -h|-P|-H|-r +0 MESSAGE" (qemu, qga/commands-posix.c); so does the
# power button. busybox init would wait a second after SIGTERM and another after SIGKILL: this is the short way, with
# the same promises. kill -1 spares init and the shell that runs this.
SHUTDOWN = """\
#!/bin/sh
verb=poweroff
for word; do
  case $word in
    -r) verb=reboot ;;
    -H) verb=halt ;;
  esac
done
trap '' TERM HUP
kill -TSTP 1
kill -TERM -1
usleep 200000
kill -KILL -1
sync
umount -a -r 2>/dev/null
$verb -f
"""

PROFILE = """\
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM="${TERM:-vt100}"
export PS1='\\u@\\h:\\w\\$ '
"""

USERS = """\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/tmp:/bin/sh
"""

NO_PASSWORDS = """\
root:*:19000:0:99999:7:::
nobody:*:19000:0:99999:7:::
"""

GROUP = """\
root:x:0:
tty:x:5:
disk:x:6:
kvm:x:104:
nogroup:x:65534:
"""

HOSTS = """\
127.0.0.1 localhost
::1 localhost
"""


def os_release(suite: str, kernel: str) -> str:
    """See os-release(5); the agent's guest-get-osinfo reads it."""
    return (
        'NAME="Mica micro"\n'
        "ID=mica-micro\n"
        "ID_LIKE=debian\n"
        f'PRETTY_NAME="Mica micro (Debian {suite}, Linux {kernel})"\n'
        f"VERSION_CODENAME={suite}\n"
    )
