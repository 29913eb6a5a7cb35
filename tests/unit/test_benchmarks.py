"""The benchmarks' own arithmetic, and their refusal to compare what cannot be compared."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks import arms, caches, raw_device, report
from benchmarks.arms import Arm, ArmError, run_arm
from benchmarks.figure import Figure, Outcome, Plan, outcome
from benchmarks.results import MAX_RAW_DRIFT, Key, Results, Series, UnmeasuredError
from benchmarks.rounds import run_rounds
from benchmarks.targets import TARGETS
from benchmarks.units import say

from diskoffload.system.files import memory_file_system

OURS, PEER, RAW = Key("ours", "seconds"), Key("peer", "seconds"), Key("raw", "bytes_per_second")


def results_of(**rounds: Sequence[float]) -> Results:
    results = Results()
    for key in (OURS, PEER, RAW):
        for number, value in enumerate(rounds.get(key.label, ())):
            results.add(key, number, value)
    return results


def test_median_and_spread() -> None:
    series = Series((4.0, 1.0, 2.0))
    assert series.median == 2.0
    assert series.spread == pytest.approx((4.0 - 1.0) / 2.0)
    assert series.drift == 4.0
    assert Series((1.0, 3.0)).median == 2.0
    still = Series((0.0, 0.0))
    assert (still.spread, still.drift) == (0.0, 1.0)


def test_a_ratio_is_of_the_same_round() -> None:
    results = results_of(ours=[1.0, 2.0, 4.0], peer=[4.0, 1.0, 2.0])
    assert results.ratio(PEER, OURS).values == (4.0, 0.5, 0.5)  # of the medians it would be 1
    results.add(Key("late", "seconds"), 2, 8.0)
    assert results.ratio(Key("late", "seconds"), OURS).values == (2.0,)


def test_a_ratio_is_refused_when_the_device_moved() -> None:
    slow = 1e9
    steady = results_of(ours=[1, 1], peer=[2, 2], raw=[slow, slow * MAX_RAW_DRIFT])
    assert steady.ratio(PEER, OURS, raw=[RAW]).median == 2.0
    moved = results_of(ours=[1, 1], peer=[2, 2], raw=[slow, slow * 2.3])
    with pytest.raises(UnmeasuredError, match=r"refused: raw device moved 2\.3x"):
        moved.ratio(PEER, OURS, raw=[RAW])
    judged = outcome("write-peer", "", moved.ratio, PEER, OURS, raw=[RAW])
    assert judged.found is None
    assert report.verdict(judged) == "refused"


def test_what_is_missing_is_named() -> None:
    results = results_of(ours=[1.0])
    results.faults["peer", None] = "peer is not installed"
    with pytest.raises(UnmeasuredError, match="peer: peer is not installed"):
        results.ratio(PEER, OURS)
    with pytest.raises(UnmeasuredError, match="raw: was not run"):
        results.series(RAW)


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        ("read", 1.5, "met"),
        ("read", 1.51, "NOT MET"),
        ("open-time", 3.0, "NOT MET"),
        ("open-time", 2.9, "met"),
        ("write", 0.85, "met"),
        ("write", 0.84, "NOT MET"),
    ],
)
def test_verdicts(target: str, value: float, words: str) -> None:
    assert report.verdict(Outcome(target, "", Series((value,)))) == words
    assert TARGETS[target].key == target


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("x_seconds", 0.00000123, "1.23 µs"),
        ("x_seconds", 0.99996, "1.00 s"),
        ("x_seconds", 150.0, "2.50 min"),
        ("x_bytes", 12_300_000, "12.3 MB"),
        ("x_bytes_per_second", 1.5e9, "1.50 GB/s"),
        ("x_count", 50_000, "50,000"),
        ("x", 0.85, "0.85x"),
        ("x_bytes", 0, "0"),
    ],
)
def test_numbers_are_said_with_units(metric: str, value: float, words: str) -> None:
    assert say(metric, value) == words


# ---------------------------------------------------------------------- caches, on a real disk


@pytest.fixture
def cached_file(tmp_path: Path) -> Path:
    if memory_file_system(tmp_path):
        pytest.skip(f"{tmp_path} is in memory, from which nothing can be dropped")
    path = tmp_path / "cached"
    path.write_bytes(os.urandom(1 << 20))
    path.read_bytes()
    assert caches.resident_bytes(path) == 1 << 20
    return path


def test_dropped_means_dropped(cached_file: Path) -> None:
    caches.drop([cached_file])
    assert caches.resident_bytes(cached_file) == 0
    with open(cached_file, "rb") as file:
        file.seek(1 << 19)
        file.read(1)
    assert 0 < caches.resident_bytes(cached_file) <= 1 << 20


def test_what_is_mapped_is_not_called_cold(
    cached_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropping all caches of the machine would not help, and disturb whoever else works on it.
    monkeypatch.setattr(caches, "_DROP_CACHES", cached_file.parent / "none")
    with (
        open(cached_file, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
    ):
        assert memory[0] is not None
        with pytest.raises(caches.StillCachedError, match=f"process {os.getpid()} maps"):
            caches.drop([cached_file])


# ---------------------------------------------------------------------- arms, in real processes


def test_an_arm_gives_its_numbers_and_leaves_nothing(tmp_path: Path) -> None:
    arm = Arm("raw", "raw_device:write", {"nbytes": (1 << 20) + 5})
    found = {sample.metric: sample.value for sample in run_arm(arm, tmp_path)}
    assert found["moved_bytes"] == (1 << 20) + 5
    assert found["bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_raw_reads_give_the_size_of_the_files(tmp_path: Path) -> None:
    paths = []
    for nbytes in (1, 4096, (8 << 20) + 3):
        paths.append(tmp_path / str(nbytes))
        paths[-1].write_bytes(b"x" * nbytes)
    samples = raw_device.read([str(path) for path in paths], str(tmp_path))
    found = {sample.metric: sample.value for sample in samples}
    assert found["moved_bytes"] == sum(path.stat().st_size for path in paths)


def test_a_failed_a_slow_and_a_missing_arm_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(ArmError, match=r"failed \(status 1\): FileNotFoundError"):
        run_arm(Arm("a", "raw_device:read", {"paths": [gone]}), tmp_path)
    with pytest.raises(ArmError, match="took more than 0 s"):
        run_arm(Arm("a", "raw_device:read", {"paths": []}, timeout_seconds=0.01), tmp_path)
    monkeypatch.setattr(arms.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArmError, match="no_such_peer is not installed"):
        run_arm(Arm("a", "raw_device:read", {"paths": []}, needs=["no_such_peer"]), tmp_path)


def test_arms_take_turns_and_a_failed_one_stays_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure("tried", "", {}, str, lambda place: Plan([], 0), lambda results: [], list)
    plan = Plan(
        [
            Arm("first", "raw_device:write", {"nbytes": 4096}),
            Arm("broken", "raw_device:no_such_function"),
            Arm("last", "raw_device:write", {"nbytes": 4096}),
        ],
        rounds=2,
    )
    results = run_rounds(figure, plan, tmp_path)
    said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "tried 1/2  first",
        "tried 1/2  broken",
        "tried 1/2  last",
        "tried 2/2  first",
        "tried 2/2  last",
    ]
    assert len(results.series(Key("first", "bytes_per_second")).values) == 2
    assert "no_such_function" in results.faults["broken", None]
