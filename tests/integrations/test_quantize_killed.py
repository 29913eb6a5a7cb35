"""Quantizing killed by SIGKILL, anywhere and again and again: the same bytes in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deadly import Deadly, in_child, was_killed
from models import digests
from quantize_bench import Bench, make_bench, noted

from diskoffload.checkpoint import publish
from diskoffload.quantize import quantize_checkpoint
from diskoffload.resumable import claim
from diskoffload.system.files import Files

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def planned(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(checkpoints["qwen3-tied"], tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(planned: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Give the job, with a note after every few tensors."""
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 16 << 10)
    yield planned
    planned.clear()


def kill_at(bench: Bench, step: int) -> bool:
    return was_killed(in_child(lambda: bench.work(Deadly(step))))


def steps_of(bench: Bench) -> list[tuple[str, int]]:
    """List the steps of a run that nothing interrupts."""
    files = Deadly()
    bench.work(files)
    bench.check()
    return files.steps


def die_and_go_on(bench: Bench, step: int, noted_before: int) -> None:
    """Kill the work at a step; repeat it to its end, from what was noted on."""
    assert kill_at(bench, step)
    if not bench.is_finished:
        assert bench.work().resumed >= noted_before
    bench.check()


def test_killed_again_and_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 1)
    kills, before = 0, 0
    while not bench.is_finished and kill_at(bench, 29):
        kills += 1
        assert kills < 40
        if bench.partial.exists():
            assert noted(bench.partial) >= before
            before = noted(bench.partial)
    assert kills >= 5
    assert before > 20
    bench.check()


def test_killed_at_the_last_steps(bench: Bench) -> None:
    """From the index to the result's own name: nothing is half there, or left over."""
    steps = steps_of(bench)
    count = len(steps)
    for number in (*range(count - 35, count - 9, 4), *range(count - 8, count)):
        die_and_go_on(bench, number, steps[number][1])


def test_killed_within_a_file_beside_the_weights(bench: Bench) -> None:
    def copy_half(source: Path, target: Path) -> None:
        content = source.read_bytes()
        target.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        publish.shutil.copyfile = copy_half  # type: ignore[attr-defined]
        bench.work()

    assert was_killed(in_child(work))
    bench.work()
    bench.check()


def test_a_weight_spread_over_two_files_is_done_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the first of the two was finished, and nothing noted since."""
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 1 << 30)
    files = Deadly()
    bench.work(files)
    bench.check()
    assert len(files.published) == 3
    for number in files.published:
        die_and_go_on(bench, number + 2, 0)


@pytest.mark.long
def test_killed_at_every_step(bench: Bench) -> None:
    steps = steps_of(bench)
    assert len(steps) > 150
    assert len({before for _, before in steps}) > 8  # notes in between, not only at the ends
    for number, (_, before) in enumerate(steps):
        die_and_go_on(bench, number, before)


@pytest.mark.long
def test_killed_at_random_moments(bench: Bench) -> None:
    chance = random.Random(4)  # the moments are random all the same: a process takes its time
    started_seconds = time.monotonic()
    bench.work(Files())
    bench.check()
    whole_seconds = time.monotonic() - started_seconds
    kills = 0
    while kills < 40:
        pid = in_child(lambda: bench.work(Files()))
        time.sleep(chance.uniform(0, whole_seconds))
        os.kill(pid, signal.SIGKILL)
        if was_killed(pid):
            kills += 1
        if bench.is_finished:
            bench.check()
    if not bench.is_finished:
        bench.work()
    bench.check()


@pytest.mark.long
def test_the_command_killed_within_one_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Real processes, each killed a moment after it noted something; one shard in all."""
    script = (
        "import sys, time; from diskoffload import cli\n"
        "from diskoffload.quantize import run\nfrom diskoffload.resumable import claim\n"
        "claim.NOTE_EVERY_BYTES = 1\n"
        "inner = run._Work._write\n"
        "def slow(self, *a):\n"
        "    time.sleep(0.05); inner(self, *a)\n"
        "run._Work._write = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    source = checkpoints["llama"]
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", script, "quantize", str(source), str(out), "--json"]
    chance = random.Random(4)
    for _ in range(3):
        before = noted(partial)
        process = subprocess.Popen([*command, "--scheme", "W8A16"], stdout=subprocess.DEVNULL)
        while noted(partial) < before + 3:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    before = noted(partial)
    assert before >= 9
    last = subprocess.run(
        [*command, "--scheme", "W8A16"], check=True, stdout=subprocess.PIPE, text=True
    )
    assert json.loads(last.stdout)["resumed"] == before
    quantize_checkpoint(source, tmp_path / "whole", "W8A16")
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
