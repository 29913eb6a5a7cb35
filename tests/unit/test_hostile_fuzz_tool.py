"""The long fuzzer: what it reports is what happened, and its targets hold for a while."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import TARGETS, Figures, main, run_case, run_target
from fuzz_engines import PLAIN, mutations
from fuzz_targets import Finding, Target, expect

from diskoffload.errors import DamagedFileError

pytestmark = pytest.mark.usefixtures("no_leaks")

CASES = 250


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_some_hundred_mutations(tmp_path: Path, name: str) -> None:
    target = TARGETS[name](tmp_path)
    seeds = target.seeds()
    assert all(run_case(target, seed) for seed in seeds[:-1])
    inputs = mutations(seeds, random.Random(0))
    accepted = sum(run_case(target, next(inputs)) for _ in range(CASES))
    assert len(seeds) - 1 <= accepted < CASES


class Planted:
    """Does something once, in the process that runs it, and refuses everything else."""

    def __init__(self, place: Path, does: Callable[[], object]) -> None:
        self._does = does

    def seeds(self) -> list[bytes]:
        return [b"harmless", b"fatal"]

    def __call__(self, data: bytes) -> None:
        if data == b"fatal":
            self._does()
        raise DamagedFileError("refused")


def run_planted(
    monkeypatch: pytest.MonkeyPatch,
    keep: Path,
    does: Callable[[], object],
    hang_seconds: float = 20.0,  # to take 200 MiB may take more than one on a busy machine
) -> Figures:
    def make(place: Path) -> Target:
        return Planted(place, does)

    monkeypatch.setitem(TARGETS, "planted", make)
    monkeypatch.setattr("fuzz._MOST_FINDINGS", 1)
    return run_target("planted", 60, engine=PLAIN, seed=0, keep=keep, hang_seconds=hang_seconds)


def fail() -> None:
    raise KeyError("planted")


def hoard() -> None:
    bytearray(200 << 20)


def ask_for_everything() -> None:
    bytearray(1 << 40)


def read_wrongly() -> None:
    expect(False, "another shape")


def speak_at_length() -> None:
    raise DamagedFileError("x" * 5000)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CRASHES = {
    fail: "KeyError: 'planted'",
    hoard: "MiB of memory",
    ask_for_everything: "MemoryError",
    read_wrongly: "another shape",
    speak_at_length: "the message is too long",
    die: "status -9",
}


@pytest.mark.parametrize("does", CRASHES, ids=lambda one: one.__name__)
def test_a_crash_is_counted_and_its_input_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: Callable[[], object]
) -> None:
    found = run_planted(monkeypatch, tmp_path, does)
    assert (found.cases, found.refused, found.crashes, found.hangs) == (2, 1, 1, 0)
    (text,) = found.findings
    assert CRASHES[does] in text
    assert (tmp_path / "planted-crash-0").read_bytes() == b"fatal"


def test_a_hang_is_ended_counted_and_its_input_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_planted(monkeypatch, tmp_path, lambda: time.sleep(600), hang_seconds=1.0)
    assert (found.cases, found.crashes, found.hangs) == (2, 0, 1)
    assert (tmp_path / "planted-hang-0").read_bytes() == b"fatal"


def test_a_finding_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(Finding):
        run_case(Planted(tmp_path, read_wrongly), b"fatal")
    assert not run_case(Planted(tmp_path, read_wrongly), b"harmless")


def test_the_command_prints_its_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keep = tmp_path / "findings"
    arguments = ["header", "--seconds", "1", "--plain", "--json", "--keep", str(keep)]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engine"] == "random mutation"
    (figures,) = report["targets"]
    assert figures["cases"] == figures["accepted"] + figures["refused"] > 100
    assert (figures["crashes"], figures["hangs"], figures["findings"]) == (0, 0, [])
    assert not keep.exists()
