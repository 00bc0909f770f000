"""The canary: its machine code is what its listing says, and the judge believes nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mica.qemu.accelerators import canary
from tests.unit.test_accelerators_kvm import GuestScript

_LISTING = Path(canary.__file__).with_name("canary.lst")


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("ld") is None, reason="GNU binutils are not installed")
def test_the_bytes_are_those_of_the_instructions_beside_them(tmp_path: Path) -> None:
    names = {name: value for name, value in vars(canary).items() if name.isupper() and isinstance(value, int)}
    source = [".intel_syntax noprefix", *(f".set {name}, {value}" for name, value in names.items())]
    lines = (line for line in _LISTING.read_text().splitlines() if line and not line.startswith("#"))
    source += [line.partition("|")[2] if "|" in line else line for line in lines]
    (tmp_path / "canary.s").write_text("\n".join(source) + "\n")
    subprocess.run(["as", "-o", tmp_path / "canary.o", tmp_path / "canary.s"], check=True)
    link = ["ld", f"-Ttext={canary.CODE:#x}", "-e", "0", "--oformat", "binary"]
    subprocess.run([*link, "-o", tmp_path / "canary.bin", tmp_path / "canary.o"], check=True)
    assert (tmp_path / "canary.bin").read_bytes() == canary.load_listing().code


def test_the_image_holds_everything_at_its_place() -> None:
    listing = canary.load_listing()
    image = canary.build_image(listing)
    assert len(image) == canary.IMAGE_SIZE
    assert len(listing.code) < canary.DATA - canary.CODE
    magic, flags, checksum = (int.from_bytes(image[at : at + 4], "little") for at in (0, 4, 8))
    assert (magic + flags + checksum) & 0xFFFFFFFF == 0
    assert listing.label_at(listing.address("fxsave_step") + 3) == "fxsave_step"
    assert listing.label_at(canary.DATA) == ""


def test_the_loop_runs_on_the_host_and_takes_longer_when_it_is_longer() -> None:
    loop = canary.make_host_loop(canary.load_listing())
    short = min(loop(1000) for _ in range(5))
    assert loop(10_000_000) > 100 * short


def _judge(stream: bytes, *, loop_s: float = 0.0) -> canary.Judge:
    judge = canary.Judge(None, lambda count: None)
    for value in stream:
        judge.byte(value, loop_s)
    return judge


def test_right_answers_are_believed() -> None:
    verdict = _judge(GuestScript().stream()).end()
    assert verdict.works
    assert verdict.loop_ratio is None
    assert [step.name for step in verdict.steps] == [
        "64-bit arithmetic",
        "CPUID",
        "cmpxchg16b",
        "fxsave64",
        "xsave",
        "page-table switch",
        "page fault",
        "model-specific register",
        "timed loop",
    ]


def test_a_guest_that_is_not_offered_xsave_is_a_good_guest() -> None:
    verdict = _judge(GuestScript(wrong={(5, 0): 0}).stream()).end()
    assert verdict.works
    assert "not offered to the guest" in [step.text for step in verdict.steps]


def test_every_single_wrong_value_is_found() -> None:
    records = GuestScript().records
    assert len(records) > 15
    for index, (step, value) in enumerate(records):
        if step == 9:
            continue  # asks for the number of turns: it carries no answer
        changed = [*records[:index], (step, value ^ 1 << 24 + 32 if step == 2 else value ^ 1), *records[index + 1 :]]
        verdict = _judge(GuestScript(records=changed).stream()).end()
        assert not verdict.works, f"step {step}, record {index}"
        assert re.search(r"step .*(wrong|gave)", verdict.reason)


def test_a_report_that_is_missing_or_out_of_order_is_found() -> None:
    records = GuestScript().records
    for index in range(len(records) - 1):
        missing = [*records[:index], *records[index + 1 :]]
        assert not _judge(GuestScript(records=missing).stream()).end().works, f"without record {index}"
        cut = records[:index]
        assert "ended in the middle" in _judge(GuestScript(records=cut).stream()).end().reason
