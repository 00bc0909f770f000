"""What a copied machine is told to do to become another one: POSIX sh, for busybox as for a whole Linux.

Every step may be repeated. Its last line of output says why it failed, or what to know of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import msgspec

from mica.guest import first_program
from mica.model.identity import Identity, Trait

NAME = "mica-identity"
# Where a guest may let a file be executed; /run often does not (mount option noexec).
DIRECTORIES = ("/dev/shm", "/run", "/tmp", "/root")  # noqa: S108 - in the guest; the name is random, and the file new
TIMED_OUT = (124, 137, 143)
"""Exit statuses by which timeout(1) says that it ended the command (busybox's says 143)."""

# Only interfaces that are devices: bridges, bonds and VLANs may have the address of one.
_FIND = """\
for p in /sys/class/net/*; do
  [ -e "$p/device" ] && read -r a <"$p/address" || continue
  case $a in
@CASES@
  esac
done
"""

# The file is new, or it is not written to; the program removes it.
_WRITE = """\
umask 077
set -C
for d in @DIRECTORIES@; do
  f=$d/@NAME@-@TOKEN@
  [ -d $d ] && printf '@PROGRAM@' >$f && chmod 700 $f && @RUN@
  [ -e $f ] && rm -f $f
done 2>/dev/null
exit 1
"""

_ONCE = "$f && exit 0"

_WAIT = """\
D=@ROOM@
if [ -p "$D/in" ] && read -r p <"$D/pid" && read -r c </proc/$p/comm; then
  case $c in @NAME@*) exit 0 ;; esac
fi 2>/dev/null
rm -rf "$D"
mkdir -m 700 "$D" && mkfifo -m 600 "$D/in" && : >"$D/out" || exit 1
started() {
  $f wait <>"$D/in" >>"$D/out" 2>/dev/null &
  p=$!
  while [ -e $f ]; do
    kill -0 $p || return 1
    sleep 0.02
  done
  echo $p >"$D/pid"
}
"""

_FALLBACK = """\
exec 2>/dev/null
r=1
if command -v perl >/dev/null; then
  perl -e @PERL@ && r=0
elif command -v python3 >/dev/null; then
  python3 -c @PYTHON@ && r=0
fi
date -u -s @@TIME@ >/dev/null
printf 'F %s %s' $r $?
"""

_PERL = """\
sysread(STDIN, $b, 608) == 608 && open(F, ">", "/dev/urandom")
  && ioctl(F, 0x40085203, $b = substr($b, 8, 72)) && ioctl(F, 0x5207, 0) or exit 1"""
_PYTHON = """\
import fcntl, sys
with open("/dev/urandom", "wb", 0) as f:
    fcntl.ioctl(f, 0x40085203, sys.stdin.buffer.read(608)[8:80])
    fcntl.ioctl(f, 0x5207, 0)"""

_SET = """\
[ "$@NAME@" != - ] && { ip link set dev "$@NAME@" address @NEW@ || ifconfig "$@NAME@" hw ether @NEW@; } >/dev/null
printf ' %s' $?
"""


def _names(macs: Mapping[str, str]) -> list[str]:
    return [f"n{index}" for index in range(len(macs))]


def _find(macs: Mapping[str, str]) -> str:
    """Put the name of each NIC's interface, or ``-``, into ``n0``, ``n1`` …"""
    if not macs:
        return ""
    cases = [
        f'    {old} | {new}) {name}="${{p##*/}}" ;;'
        for (old, new), name in zip(macs.items(), _names(macs), strict=True)
    ]
    return " ".join(f"{name}=-" for name in _names(macs)) + "\n" + _FIND.replace("@CASES@", "\n".join(cases))


def _fill(script: str, values: Mapping[str, str]) -> str:
    for key, value in values.items():
        script = script.replace(f"@{key}@", value)
    return script


def _write(token: str, run: str) -> str:
    values = {"DIRECTORIES": " ".join(DIRECTORIES), "NAME": NAME, "TOKEN": token, "RUN": run}
    return _fill(_WRITE, {**values, "PROGRAM": first_program.octal()})


def first(token: str) -> str:
    """Write the program of :mod:`mica.guest.first_program` and start it, with its order on standard input."""
    return _write(token, _ONCE)


def prepare(room: str, token: str) -> str:
    """Have the program wait for orders at the FIFO ``in`` of the directory ``room``, with its answers in ``out``."""
    return _fill(_WAIT, {"ROOM": shlex.quote(room), "NAME": NAME}) + _write(token, "started && exit 0")


def fallback(macs: Mapping[str, str], unix_time_s: float) -> str:
    """What the program does, by what the guest has: for one that lets no file be executed. Input: the same order."""
    values = {"PERL": shlex.quote(_PERL), "PYTHON": shlex.quote(_PYTHON), "TIME": str(round(unix_time_s))}
    sets = [_fill(_SET, {"NAME": name, "NEW": new}) for name, new in zip(_names(macs), macs.values(), strict=True)]
    return _find(macs) + _fill(_FALLBACK, values) + "".join(sets)


def fallback_results(output: bytes, nics: int) -> list[int] | None:
    """Exit statuses for the generator, the clock and each NIC; ``None`` when that is not what was said."""
    mark, *words = output.decode("ascii", "replace").split()[: nics + 4] or [""]
    if mark != "F" or len(words) != 2 + nics or not all(word.isdigit() and len(word) <= 3 for word in words):
        return None
    return [int(word) for word in words]


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Step(msgspec.Struct, frozen=True):
    """One trait's script and its arguments; the guest ends it after ``timeout_s``."""

    what: Trait
    script: str
    arguments: tuple[str, ...] = ()
    timeout_s: float = 30.0


def bounded(step: Step) -> str:
    """The step's script, ended in time where the guest has timeout(1)."""
    text = shlex.quote(step.script)
    limit = f"timeout -s TERM {step.timeout_s:g}"
    run = f'/bin/sh -c {text} "$0" "$@"'
    return f"command -v timeout >/dev/null 2>&1 && exec {limit} {run}\nexec {run}"


_HOSTNAME = r"""
new=$1
read -r old </proc/sys/kernel/hostname
echo "$new" >/proc/sys/kernel/hostname || exit 1
echo "$new" >/etc/hostname || exit 1
[ -f /etc/hosts ] || exit 0
hosts=$(awk -v o="$old" -v n="$new" '
  function renamed(w) {
    if (w == o) return n
    if (index(w, o ".") == 1) return n substr(w, length(o) + 1)
    return w
  }
  !/^[ \t]*#/ && o != "localhost" { for (i = 2; i <= NF; i++) if (renamed($i) != $i) $i = renamed($i) }
  $1 == "127.0.1.1" { for (i = 2; i <= NF && $i != n; i++); if (i > NF) $1 = $1 " " n }
  { for (i = 2; i <= NF; i++) if ($i == n) found = 1; print }
  END { if (!found) print "127.0.1.1\t" n }
' /etc/hosts) && printf '%s\n' "$hosts" >/etc/hosts
"""
"""Arguments: the new name."""

_MACHINE_ID = r"""
new=$1 old=
[ -e /etc/machine-id ] || { echo "the guest has none"; exit 0; }
read -r old </etc/machine-id
if [ "$old" != "$new" ]; then
  echo "$new" >/etc/machine-id || exit 1
  for d in /var/log/journal /run/log/journal; do
    [ "$old" ] && [ -d "$d/$old" ] && [ ! -e "$d/$new" ] && mv "$d/$old" "$d/$new"
  done
fi
f=/var/lib/dbus/machine-id
if [ -f $f ] && [ ! -L $f ]; then
  echo "$new" >$f || exit 1
fi
if [ -d /run/systemd/system ]; then
  [ "$old" = "$new" ] || systemctl try-restart systemd-journald.service || exit 1
  echo "programs that asked for it before go on with the old one"
fi
"""
"""Arguments: the new id. The journal moves along, so that the log of the copy goes on where the original's was."""

_HOST_KEYS = r"""
mark=/run/mica-host-keys
set -- "$1" /etc/ssh/ssh_host_*_key
id=$1
shift
if [ ! -e "$1" ]; then
  for k in /etc/dropbear/dropbear_*_host_key; do
    [ -e "$k" ] && echo "the keys of dropbear are the original's" && exit 1
  done
  echo "the guest has none"
  exit 0
fi
[ -e $mark ] && read -r a <$mark && [ "$a" = "$id" ] && exit 0
command -v ssh-keygen >/dev/null || { echo "ssh-keygen is not there"; exit 1; }
t=$(mktemp -d /etc/ssh/.mica.XXXXXX) || exit 1
trap 'rm -rf "$t"' EXIT
trap 'exit 1' TERM INT HUP
kept=
for k; do
  n=${k##*/}
  a=${n#ssh_host_}
  if ssh-keygen -q -t "${a%_key}" -N '' -C "root@$(uname -n)" -f "$t/new" </dev/null >/dev/null 2>&1; then
    cp -p "$k" "$t/$n" && cat "$t/new" >"$t/$n" && cat "$t/new.pub" >"$t/$n.pub" || exit 1
    [ -e "$k.pub" ] && cp -p "$k.pub" "$t/$n.mode" && cat "$t/new.pub" >"$t/$n.mode" && mv "$t/$n.mode" "$t/$n.pub"
    rm -f "$t/new" "$t/new.pub"
  else
    kept="$kept $n"
    rm -f "$t/new" "$t/new.pub"
  fi
done
chmod a+r "$t"/*.pub 2>/dev/null
sync "$t"/* 2>/dev/null
for k; do
  n=${k##*/}
  [ -e "$t/$n" ] && mv "$t/$n" "$k" && mv "$t/$n.pub" "$k.pub"
done
command -v restorecon >/dev/null && restorecon /etc/ssh/ssh_host_*
if [ -d /run/systemd/system ]; then
  for u in ssh.service sshd.service; do systemctl try-reload-or-restart $u 2>/dev/null; done
else
  for p in /run/sshd.pid /var/run/sshd.pid; do
    [ -e $p ] && kill -HUP "$(cat $p)" 2>/dev/null && break
  done
fi
[ -z "$kept" ] || { echo "no new ones could be made for$kept"; exit 1; }
echo "$id" >$mark
"""
"""Arguments: the machine's id. New keys are all there before the first old one is replaced."""

_CLOUD_INIT = r"""
new=$1 parent=$2 d=/var/lib/cloud old= dmi=
[ -d $d ] || { echo "the guest has none"; exit 0; }
[ -e /run/cloud-init/disabled ] && { echo "it is disabled"; exit 0; }
n=0
while [ ! -e /run/cloud-init/result.json ]; do
  n=$((n + 1))
  [ $n -lt 60 ] || { echo "it has not finished the original's boot"; exit 1; }
  sleep 1
done
read -r old <$d/data/instance-id
[ "$old" = "$new" ] && exit 0
case $old in '' | . | .. | */*) echo "it has no instance"; exit 1 ;; esac
read -r dmi </sys/class/dmi/id/product_serial
case ";${dmi#ds=nocloud*;};" in
  *";i=$old;"*) ;;
  *) [ "$old" = "$parent" ] || { echo "its instance $old comes from elsewhere, and is left"; exit 0; } ;;
esac
[ -d "$d/instances/$old" ] || { echo "its instance $old is not there"; exit 1; }
if [ ! -d "$d/instances/$new" ]; then
  rm -rf "$d/instances/.mica"
  cp -a "$d/instances/$old" "$d/instances/.mica" && mv "$d/instances/.mica" "$d/instances/$new" || exit 1
fi
ln -sfn "$d/instances/$new" $d/instance || exit 1
[ -e /run/cloud-init/.instance-id ] && echo "$new" >/run/cloud-init/.instance-id
echo "$old" >$d/data/previous-instance-id
for f in /run/cloud-init/instance-data.json /run/cloud-init/instance-data-sensitive.json; do
  [ -f $f ] && t=$(sed "s/$old/$new/g" $f) && printf '%s\n' "$t" >$f
done
echo "$new" >$d/data/instance-id
"""
"""Arguments: new and old instance id. At its next start cloud-init finds the new id on the host's side, and in its own
data that this instance has been set up: what is done once for an instance (keys, users, user data) is not done again.
The instance is only renamed where its id came from the machine; one from a seed disk is the same for the copy."""

_ADDRESS = r"""
names=
for n in @NAMES@; do [ "$n" = - ] || names="$names $n"; done
[ "$names" ] || { echo "it has no interface that changed"; exit @NONE@; }
@CONFIGS@
addresses() {
  ip -4 addr show dev "$1" 2>/dev/null | sed -n 's/.*inet \([0-9.]*\).*/\1/p'
}
old=
for n in $names; do old="$old $(addresses "$n")"; done
how=
if [ -d /run/systemd/system ] && systemctl -q is-active systemd-networkd.service; then
  # It takes the machine id, which names it to DHCP servers, only when it starts.
  systemctl restart systemd-networkd.service && how=systemd-networkd
fi
if [ -z "$how" ] && command -v nmcli >/dev/null && nmcli -t general status >/dev/null 2>&1; then
  how=NetworkManager
  for n in $names; do nmcli device disconnect "$n"; nmcli device connect "$n" || how=; done >/dev/null 2>&1
  old=
fi
for n in $names; do
  [ -z "$how" ] || [ "$how" = udhcpc ] || [ "$how" = ifupdown ] || [ "$how" = dhcpcd ] || break
  if [ -e "/run/udhcpc.$n.pid" ]; then
    # Signals that wait together come in the order of their numbers, and this one must come first.
    ip link set "$n" up
    kill -USR2 "$(cat "/run/udhcpc.$n.pid")" || continue
    i=0
    until sleep 0.1; [ $i -ge 50 ] || [ -z "$(addresses "$n")" ]; do i=$((i + 1)); done
    [ $i -ge 50 ] || old=
    kill -USR1 "$(cat "/run/udhcpc.$n.pid")" && how=udhcpc
  elif command -v ifquery >/dev/null && ifquery --state "$n" >/dev/null 2>&1; then
    ifdown --force "$n" >/dev/null 2>&1
    ifup "$n" >/dev/null 2>&1 && how=ifupdown
    old=
  elif command -v dhcpcd >/dev/null; then
    dhcpcd -n "$n" >/dev/null 2>&1 && how=dhcpcd
  fi
done
[ "$how" ] || { echo "nothing that Mica knows manages its network: addresses are the original's"; exit 1; }
for n in $names; do
  # What it has is the old address until it is given back; a network of another kind may give the same one again.
  i=0
  while g=$(addresses "$n"); do
    case " $old " in *" $g "*) [ "$g" ] && [ $i -ge 20 ] && break ;; *) [ "$g" ] && break ;; esac
    i=$((i + 1))
    [ $i -lt 100 ] || { echo "$n got no address from $how"; exit 1; }
    [ "$how" = udhcpc ] && [ $((i % 20)) = 0 ] && kill -USR1 "$(cat "/run/udhcpc.$n.pid")"
    sleep 0.2
  done
  # The link-local address is made from the MAC address when the interface comes up, or when this is switched on.
  # Giving an address back may take it away.
  g=/proc/sys/net/ipv6/conf/$n/addr_gen_mode
  if [ -w "$g" ] && [ "$(cat "$g")" = 0 ]; then
    ip -6 addr flush dev "$n" scope link
    echo 1 >"$g"
    echo 0 >"$g"
  fi
  i=0
  until g=$(ip -4 route | sed -n "s/^default via \\([0-9.]*\\) dev $n.*/\\1/p;T;q") && [ "$g" ] || [ $i -ge 10 ]; do
    i=$((i + 1))
    sleep 0.1
  done
  [ "$g" ] || continue
  if command -v bash >/dev/null; then
    bash -c 'echo >"/dev/udp/$1/9"' - "$g" 2>/dev/null
  elif command -v ping >/dev/null; then
    ping -c 1 -W 1 "$g" >/dev/null 2>&1 &
  fi
done
echo "renewed by $how"
"""
"""The addresses that configuration names follow, and DHCP is asked anew. What comes in through a published port goes to
the address that the guest was last seen to use (passt(1)), which is the old one when it gave that back: so something is
sent from the new one."""

# Files that may name an interface by its MAC address. Those below /run are read by what runs now, to which the
# interface's permanent address is still the old one.
_CONFIG = r"""
for f in $(grep -rlisF -- @OLD@ /etc/netplan /etc/systemd/network /etc/network /etc/NetworkManager \
    /etc/sysconfig/network-scripts /etc/udev/rules.d); do
  sed -i 's/@OLD@/@NEW@/gI' "$f" || exit 1
done
for f in $(grep -rlisF -- @OLD@ /run/systemd/network); do
  grep -qi @NEW@ "$f" || sed -i 's/@OLD@/@OLD@ @NEW@/gI' "$f" || exit 1
done
"""

_SEED_FILE = r"""
done=
for p in /lib/systemd/systemd-random-seed /usr/lib/systemd/systemd-random-seed; do
  if [ -x $p ] && [ -e /var/lib/systemd/random-seed ]; then
    $p save && done=1
    break
  fi
done
esp=$(sed -n 's|^[^ ]* \([^ ]*\) vfat .*|\1/loader/random-seed|p' /proc/mounts)
for f in /var/lib/systemd/random-seed /var/lib/urandom/random-seed /var/lib/misc/random-seed $esp; do
  [ -f $f ] || continue
  [ "$done" ] && [ $f = /var/lib/systemd/random-seed ] && continue
  n=$(wc -c <$f)
  [ "$n" -gt 0 ] && [ "$n" -le 4096 ] || n=512
  dd if=/dev/urandom of=$f bs="$n" count=1 conv=notrunc 2>/dev/null && done=1 || exit 1
done
if [ -d /var/lib/seedrng ] && command -v seedrng >/dev/null; then
  seedrng >/dev/null 2>&1 && done=1 || exit 1
fi
[ "$done" ] || echo "the guest has none"
"""
"""What the generator of the next start begins with."""


def rest(identity: Identity) -> tuple[Step, ...]:
    """The steps of ``REST``, in that order."""
    machine_id = identity.id.replace("-", "").lower()
    names = " ".join(f'"${name}"' for name in _names(identity.macs))
    configs = "".join(_fill(_CONFIG, {"OLD": old, "NEW": new}) for old, new in identity.macs.items())
    address = _fill(_ADDRESS, {"NAMES": names, "CONFIGS": configs, "NONE": "1" if identity.macs else "0"})
    hostname = _HOSTNAME if identity.hostname else "echo 'none was asked for'"
    return (
        Step(Trait.HOSTNAME, hostname, (identity.hostname,)),
        Step(Trait.MACHINE_ID, _MACHINE_ID, (machine_id,)),
        Step(Trait.ADDRESS, _find(identity.macs) + address, (), 60.0),
        Step(Trait.HOST_KEYS, _HOST_KEYS, (identity.id,), 180.0),
        Step(Trait.CLOUD_INIT, _CLOUD_INIT, (identity.id, identity.parent_id), 120.0),
        Step(Trait.SEED_FILE, _SEED_FILE),
    )
