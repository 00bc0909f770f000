"""``make demo``: the main job on real guests, told with times. Ends with status 0 and leaves nothing running.

Uses a MICA_HOME of its own below ``.cache/``, so it touches no VM of yours; the image built there is kept, which is
why a second run takes seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mica import Client, MicaError
from mica.client import daemon
from mica.client.handle import VmHandle
from mica.model.errors import Code
from mica.model.vm import AgentState, VmState

HOME = Path(__file__).resolve().parent.parent / ".cache" / "demo"
NAMES = ("alpha", "beta", "gamma")
ADOPTION_S = 60
LONG_JOB = "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.5; done"

console = Console(highlight=False)


class Report:
    """What was done, how long it took, and what came of it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        result: list[str] = []
        console.print(f"  {what} …", end="")
        began = time.monotonic()
        yield result
        took = time.monotonic() - began
        self.rows.append((what, took, result[-1] if result else ""))
        console.print(f" {took:.2f} s  [dim]{result[-1] if result else ''}[/dim]", soft_wrap=True)

    def table(self) -> Table:
        table = Table("what", "seconds", "result", box=None, pad_edge=False)
        for what, took, result in self.rows:
            table.add_row(what, f"{took:.2f}", result)
        return table


def _hold(true: bool, otherwise: str) -> None:
    """What the demo shows must be so."""
    if not true:
        raise MicaError(Code.INTERNAL, otherwise)


async def _kill_daemon(client: Client, vms: list[VmHandle]) -> str:
    """SIGKILL the daemon, look at the VMs' processes, let the next request start a new daemon."""
    pid = (await client.host()).pid
    processes = [vm.view.process.pid for vm in vms if vm.view.process is not None]
    os.kill(pid, signal.SIGKILL)
    alive = sum(Path(f"/proc/{p}").exists() for p in processes)
    _hold(alive == len(NAMES), f"only {alive} of {len(NAMES)} VMs survived the daemon")
    return f"daemon {pid} is dead, {alive} of {len(processes)} QEMU processes live on"


async def _wait_adopted(client: Client) -> list[VmHandle]:
    async with asyncio.timeout(ADOPTION_S):
        while True:
            vms = [vm for vm in await client.vms.list() if vm.name in NAMES]
            if all(vm.state is VmState.RUNNING and vm.view.observed.agent is AgentState.READY for vm in vms):
                return vms
            await asyncio.sleep(0.02)


async def _copies(report: Report, vm: VmHandle) -> VmHandle:
    """A snapshot, a copy of the running machine, and the way back; returns the copy."""

    async def word() -> str:
        return str(await vm.exec("cat", "/tmp/word")).strip()

    await vm.exec("sh", "-c", "echo before > /tmp/word")
    with report.step("take a snapshot of one, memory and all") as out:
        taken = await vm.snapshot("before")
        out.append(f"it stood still for {(taken.snapshot.pause_s or 0) * 1000:.0f} ms; {taken.size / 2**20:.0f} MiB")
    with report.step("fork it: a running copy with the same memory") as out:
        (copy,) = await vm.fork(name="copy")
        await copy.wait_agent()
        said = str(await copy.exec("cat", "/tmp/word")).strip()
        _hold(said == "before", f"the copy remembers {said!r}")
        out.append(f"{copy.name} {copy.view.nics[0].address} remembers {said!r}")
    await vm.exec("sh", "-c", "echo after > /tmp/word")
    with report.step("go back to the snapshot") as out:
        await vm.restore_snapshot("before", keep=False)
        await vm.wait_agent()
        _hold(await word() == "before", f"it remembers {await word()!r}")
        out.append(f"{vm.name} remembers {await word()!r} again")
    return copy


async def demo(report: Report) -> None:
    async with Client(home=HOME) as client:
        await client.host()
        for old in await client.vms.list():  # of a demo that was interrupted
            await old.remove()
        with report.step("prove the accelerator") as out:
            doctor = await client.doctor()
            found = (await client.host()).accelerator
            proofs = [f.proof for f in doctor.findings if f.id == f"accelerator-{found}"]
            _hold(
                bool(proofs), "this host cannot run machines yet: `.venv/bin/mica doctor` says why, and what closes it"
            )
            out.append(f"{found}: {proofs[0]}")
        with report.step("image micro (built from Debian's packages the first time)") as out:
            image = await client.images.ensure("micro")
            out.append(f"{image.image.digest[7:19]}, {image.image.size / 2**20:.0f} MiB")
        with report.step("start three VMs side by side, until their agents answer") as out:
            vms = list(await asyncio.gather(*(client.run("micro", name=name) for name in NAMES)))
            out.append(", ".join(f"{vm.name} {vm.view.nics[0].address}" for vm in vms))
        with report.step("run a command in each") as out:
            answers = await asyncio.gather(*(vm.exec("sh", "-c", "echo $(hostname) runs $(uname -sr)") for vm in vms))
            out.append("; ".join(str(a).strip() for a in answers))
        with report.step("pause and resume one") as out:
            held, free = (await vms[0].pause()).state, (await vms[0].resume()).state
            _hold((held, free) == (VmState.PAUSED, VmState.RUNNING), f"it was {held}, then {free}")
            out.append(f"{held}, then {free}")
        copy = await _copies(report, vms[0])
        async with vms[1].exec_stream("sh", "-c", LONG_JOB) as job:
            with report.step("kill the daemon with SIGKILL") as out:
                out.append(await _kill_daemon(client, vms))
            with report.step("a new daemon adopts them") as out:
                vms = await _wait_adopted(client)
                out.append(f"{len(vms)} running, agents ready")
            with report.step("the command that ran meanwhile ends with its output whole") as out:
                said = b"".join([data async for channel, data in job if channel == "stdout"]).splitlines()
                status = job.result().exit_code
                _hold(said == [b"line %d" % i for i in range(1, 7)] and status == 0, f"it said {said}, status {status}")
                out.append(f"{len(said)} of 6 lines, status {status}")
        with report.step("stop them, as their guests are asked to") as out:
            await asyncio.gather(*(vm.stop() for vm in vms))
            out.append("; ".join([f"{vm.name}: {(await vm.refresh()).observed.reason}" for vm in vms]))
        with report.step("delete them without a trace") as out:
            await asyncio.gather(copy.delete(purge=True, force=True), *(vm.delete(purge=True) for vm in vms))
            left = await client.vms.list()
            _hold(not left, f"left: {', '.join(vm.name for vm in left)}")
            out.append("0 VMs left")


async def main() -> int:
    HOME.mkdir(parents=True, exist_ok=True)
    # Machines that boot, each of them: this is about what happens to them then.
    (HOME / "config.toml").write_text('boot_once = "false"\n', encoding="utf-8")
    place = daemon.locate(HOME, os.environ, os.geteuid())
    report = Report()
    console.print("Mica's main job, on this machine:\n")
    try:
        await demo(report)
    except MicaError as error:
        console.print(f"\n[red]{error.message}[/red]\n{error.hint}")
        return error.info.exit_status
    finally:
        async with Client(home=HOME) as client:  # whatever became of the daemon: one is started that knows what lives
            for vm in await client.vms.list():
                await vm.remove()
        await daemon.stop(place, timeout_s=30)
    console.print()
    console.print(report.table())
    console.print(
        "\nNothing is left running. Try next:\n"
        "  .venv/bin/mica run micro --name first      a VM of your own, in seconds\n"
        "  .venv/bin/mica vm exec first -- uname -a   a command in it\n"
        "  .venv/bin/mica fork first --count 2        two running copies of it, memory and all\n"
        "  .venv/bin/mica vm console first            its serial console (Ctrl-] q leaves)\n"
        "  .venv/bin/mica run debian --name deb       a full Debian (its image takes a minute the first time)\n"
        "  .venv/bin/mica doctor                      what this host can do, proven",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
