"""The shell that runs inside the guest: POSIX sh, with cat, dd, mkdir, mkfifo and rm (busybox or coreutils).

A *runner* is a shell that waits for commands in a directory of its own (mode 0700) and executes them one after the
other. It exists because a daemon may die at any moment: what a command writes must lie in files that can be read
again, and its exit status must outlive the agent's one and only answer about it. And because it is quick: starting
a process from the agent costs more than everything else together, and the two pumps wait ready-made. A pump serves
one command after the other: it opens its FIFO, which waits for the runner to open the other end for a command, and
reads until nobody writes any more.

Files in the directory::

    l           the log: one line for each event, appended; see :mod:`mica.guest.log`
    x           what to do next: shell that becomes the command
    c           FIFO by which the host says that it has written x, with the number of the command, and before the
                next one, with any line, that it has what it wanted of the last
    f           there is a feeder of stdin
    o e i s     FIFOs: the command's stdout, stderr, stdin, and the host's word to the feeder of stdin
    o.N e.N     segments of stdout and stderr, the host reads them by offset; segment 0 is appended to by every command
    ao ae       FIFOs by which the host says how many segments it has read; the pump removes those
    in.*        what the host writes for stdin

A pump copies a pipe into segments. ``dd`` counts reads, not bytes, so a segment grows by at most 128 times 8 KiB and
everything that was written appears at once. When ``K`` segments are unread the pump waits, then the pipe fills, then
the command waits: the guest never holds more than K + 1 MiB for each stream. A runner whose command needed more than
segment 0 is not used again.

Shell in dash and busybox reads a FIFO byte by byte, which costs a system call each: lines are short, and whatever is
longer goes through a file. The process of the next command is forked beforehand and waits for its number; but only
when the host has the end of the last command, which it would otherwise get later.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from mica.model.exec import ExecSpec

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SEGMENT_READS = 128
SEGMENT_BLOCK = 8192

_IDENTIFIER = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")

RUNNER = r"""
umask 077
K=$1 T=$2
shift 2
for D; do
  D=$D/mica-$T
  mkdir -m 700 "$D" 2>/dev/null && break
  D=
done
[ "$D" ] || exit 3
cd "$D" && mkfifo c o e i s ao ae || exit 4
mica_log() { echo "$*" >>"$D/l"; }
mica_pump() {
  i=$((i + 1)) n=0 k=0
  exec 5<$1
  while :; do
    LC_ALL=C dd bs=@BLOCK@ count=@READS@ <&5 2>"t$1" >>"$1.$n" || { mica_log w $i $1 $n; exit; }
    IFS='+ ' read -r a b r <"t$1"
    case $a$b in
      '' | *[!0-9]*) [ $n = 0 ] || [ -s "$1.$n" ] || break ;;
      *)
        if [ $((a + b)) = 0 ]; then break; fi
        if [ $((a + b)) -lt @READS@ ]; then
          n=$((n + 1))
          break
        fi ;;
    esac
    n=$((n + 1))
    mica_log g $i $1 $n
    [ $((n - k)) -ge $K ] || continue
    exec 3<>"a$1"
    while [ $((n - k)) -ge $K ]; do
      read -r a <&3 || exit
      r=
      while [ $k -lt $a ]; do
        r="$r $1.$k"
        k=$((k + 1))
      done
      [ "$r" ] && rm -f $r
    done
  done
  mica_log e $i $1 $n
}
mica_feed() {
  exec 3<>s 4</dev/null
  f=
  while read -r a b <&3; do
    cat <&4
    case $a in
      n)
        exec 4<"$b"
        [ "$f" ] && rm -f "$f" && mica_log i $i $f
        f=$b
        cat <&4 ;;
      q) break ;;
    esac
  done
}
i=0
while :; do mica_pump o; done &
while :; do mica_pump e; done &
exec 7<>c
while :; do
  i=$((i + 1))
  exec 8>o 9>e
  [ $i = 1 ] && : >>o.0 && : >>e.0 && mica_log r $$
  (
    umask 022
    set -- /proc/self/task/*
    mica_log a $i ${1##*/}
    read -r a <&7 && [ "$a" = $i ] && exec 7<&- && . ./x
    exit 125
  ) </dev/null >&8 2>&9 8>&- 9>&-
  r=$?
  exec 8>&- 9>&-
  mica_log x $i $r
  if [ -e f ]; then
    exec 3<>s
    echo q >&3
    exec 3>&-
  fi
  read -r a <&7
done
""".replace("@BLOCK@", str(SEGMENT_BLOCK)).replace("@READS@", str(SEGMENT_READS))
"""Arguments: how many unread segments make a pump wait, a token, and the directories to try, in order."""

_FIND_USER = r"""
mica_user() {
  l=$(getent passwd "$1" 2>/dev/null) || while read -r l; do
    case $l in "$1":* | *:*:"$1":*:*:*:*) break ;; esac
    l=
  done </etc/passwd
  IFS=:
  set -f
  set -- $l
  set +f
  unset IFS
  U=${3-} G=${4-} N=${1-} HOME=${6:-/} SHELL=${7:-/bin/sh}
}
"""

_FEEDER = """\
: >f
exec 3<>i
exec <i 6>i 3>&-
( { mica_feed; } >&6 6>&- 2>/dev/null </dev/null & )
exec 6>&-
"""

_SETPRIV = "setpriv --help 2>&1 | grep -q init-groups"

# One row of /proc/PID/stat (proc(5)): the name in parentheses may contain anything, so cut after the last ") ".
_PROCESSES = r"""
IFS='
'
P=
for l in $(cat /proc/[0-9]*/stat 2>/dev/null); do
  q=${l%% *}
  r=${l##*) }
  case $q in '' | *[!0-9]*) continue ;; esac
  IFS=' '
  set -- $r
  IFS='
'
  [ "${1-}" = Z ] && continue
  P="$P$q ${2-0} ${4-0} ${20:-0}
"
done
"""

KILL = (
    r"""
S=$1 R=$2 C=$3 A=$4
"""
    + _PROCESSES
    + r"""
IFS='
'
for l in $P; do
  IFS=' '
  set -- $l
  IFS='
'
  [ $1 = "$C" ] && [ -z "$A" ] && A=$4
done
V=" $C " X=" $R " n=
while [ "$n" != "$V" ]; do
  n=$V
  for l in $P; do
    IFS=' '
    set -- $l
    IFS='
'
    case $V$X in *" $1 "*) continue ;; esac
    case $V in *" $2 "*) V="$V$1 "; continue ;; esac
    case $X in *" $2 "*) X="$X$1 "; continue ;; esac
    [ $3 = $R ] && [ "$A" ] && [ $4 -ge $A ] && V="$V$1 "
  done
done
IFS=' '
for q in $V; do kill -$S $q 2>/dev/null && echo $q; done
echo start $A
"""
)
"""Arguments: signal, runner's pid, command's pid, and the command's start time in ticks where it is known from before.
Signals the command, its descendants, and whatever of its session was started
after it (orphans), but never the runner and its pumps. Prints the pids that took the signal."""

RETIRE = r"""
case $1 in */mica-*) ;; *) exit 2 ;; esac
for q in /proc/[0-9]*; do
  [ $q/cwd -ef "$1" ] && kill -9 ${q##*/} 2>/dev/null
done
rm -rf "$1"
"""
"""Argument: a runner's directory. Ends the runner, its pumps and their dd, told by where they are, and removes the
directory. Only for a runner whose command has ended: what the command left running keeps running."""

ABANDON = r"""
T=$1
shift
for q in /proc/[0-9]*; do
  grep -qs "mica-$T" $q/cmdline && kill -9 ${q##*/} 2>/dev/null
done
for d; do rm -rf "$d/mica-$T"; done
"""
"""Arguments: a runner's token, and where runners live. Ends a runner wherever it has come to: it is told by its command
line, which it has before it has a directory. Only for one that was never given a command."""

SWEEP = r"""
K=$1
shift
for b; do
  for d in "$b"/mica-*; do
    case " $K " in *" $d "*) continue ;; esac
    [ -O "$d" ] && read -r a p <"$d/l" && [ "$a" = r ] && echo "$p $d"
  done
done
"""
"""Arguments: the directories to keep, separated by spaces, and where runners live. Prints pid and directory of every
other runner."""


def quote(text: str) -> str:
    """``text`` as one word of sh."""
    return shlex.quote(text)


def command_script(spec: ExecSpec, sequence: int) -> str:
    """What the runner reads to become the command. What cannot be done is logged as ``n SEQUENCE REASON``."""
    never = f"mica_log n {sequence}"
    lines = [f"mica_log s {sequence}"]
    if spec.stdin:
        lines += _FEEDER.splitlines()
    prefix: list[str] = []
    if spec.user is not None:
        lines += _switch_user(spec.user, never)
        prefix = ["$mica_as"]
    else:
        lines += ["HOME=${HOME:-/root} USER=root LOGNAME=root SHELL=/bin/sh"]
    lines += ["export PATH HOME USER LOGNAME SHELL"]
    plain = {name: value for name, value in spec.env.items() if _IDENTIFIER.match(name)}
    strange = [f"{name}={value}" for name, value in spec.env.items() if name not in plain]
    lines += [f"export {name}={quote(value)}" for name, value in plain.items()]
    if spec.cwd is None:
        lines.append('cd "$HOME" 2>/dev/null || cd /')
    else:
        lines.append(f"cd {quote(spec.cwd)} 2>/dev/null || {{ {never} cwd; exit 126; }}")
    program = quote(spec.argv[0])
    found = (
        f"[ -f {program} ] && [ -x {program} ]" if "/" in spec.argv[0] else f"command -v -- {program} >/dev/null 2>&1"
    )
    lines.append(f"{found} || {{ {never} program; exit 127; }}")
    lines.append("unset OLDPWD")
    words = [quote(word) for word in spec.argv]
    if strange:
        words = ["env", *(quote(item) for item in strange), *words]
    if prefix:
        lines.append(f"set -- {' '.join(words)}")
        # The command's own options come after "--", or su would take them for its own.
        lines.append('[ "$mica_su" ] && exec su -s /bin/sh -c \'exec "$0" "$@"\' -- "$mica_su" "$@"')
        lines.append('exec $mica_as "$@"')
    else:
        lines.append("exec " + " ".join(words))
    return "\n".join(lines) + "\n"


def _switch_user(user: str, never: str) -> Sequence[str]:
    name, _, group = user.partition(":")
    lines = [
        _FIND_USER,
        f"mica_user {quote(name)}",
        f'[ "$U" ] || case {quote(name)} in *[!0-9]*) {never} user; exit 126 ;; *) U={quote(name)} G=$U ;; esac',
        "USER=${N:-$U} LOGNAME=${N:-$U} mica_as= mica_su=",
    ]
    if group:
        lines.append(f"G={quote(group)} mica_group=1")
    lines += [
        f"if {_SETPRIV}; then",
        "  g=--init-groups",
        '  [ "$N" ] && [ -z "${mica_group-}" ] || g=--clear-groups',
        '  mica_as="setpriv --reuid=$U --regid=$G $g --"',
        'elif [ "$N" ] && [ -z "${mica_group-}" ]; then',
        "  mica_su=$N",
        "else",
        f"  {never} setpriv",
        "  exit 126",
        "fi",
    ]
    return lines
