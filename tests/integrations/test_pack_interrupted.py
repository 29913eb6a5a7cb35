"""Packing and unpacking killed, failed or without power anywhere: the same bytes in the end."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deadly import Deadly, in_child, was_killed
from failing_files import Failing
from pack_bench import PackBench, make_bench
from power_disks import Recorder, Tree, make
from quantize_bench import noted

from diskoffload.errors import StorageError
from diskoffload.resumable import claim
from diskoffload.system.files import Files


@pytest.fixture(scope="module", params=["pack", "unpack"])
def planned(
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> PackBench:
    root = tmp_path_factory.mktemp("bench")
    return make_bench(checkpoints["qwen3-tied"], root, request.param)


@pytest.fixture
def bench(planned: PackBench, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackBench]:
    """Give the job, with a note after every few tensors."""
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 16 << 10)
    yield planned
    planned.clear()


def kill_at(bench: PackBench, step: int) -> bool:
    return was_killed(in_child(lambda: bench.work(Deadly(step))))


def steps_of(bench: PackBench) -> list[tuple[str, int]]:
    files = Deadly()
    bench.work(files)
    bench.check()
    return files.steps


def die_and_go_on(bench: PackBench, step: int, noted_before: int) -> None:
    """Kill the work at a step; repeat it to its end, from what was noted on."""
    assert kill_at(bench, step)
    if not bench.is_finished:
        assert bench.work() >= noted_before
    bench.check()


def test_killed_again_and_again(bench: PackBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 1)
    kills, before = 0, 0
    while not bench.is_finished and kill_at(bench, 29):
        kills += 1
        assert kills < 40
        if bench.partial.exists():
            assert noted(bench.partial) >= before
            before = noted(bench.partial)
    assert kills >= 3
    assert before > 20
    bench.check()


def test_killed_at_some_steps(bench: PackBench) -> None:
    steps = steps_of(bench)
    count = len(steps)
    assert len({before for _, before in steps}) > 5  # notes in between, not only at the ends
    for number in (*range(3, count - 12, 11), *range(count - 8, count)):
        die_and_go_on(bench, number, steps[number][1])


@pytest.mark.long
def test_killed_at_every_step(bench: PackBench) -> None:
    for number, (_, before) in enumerate(steps_of(bench)):
        die_and_go_on(bench, number, before)


@pytest.mark.long
def test_killed_at_random_moments(bench: PackBench) -> None:
    chance = random.Random(6)  # the moments are random all the same: a process takes its time
    began_seconds = time.monotonic()
    bench.work(Files())
    bench.check()
    whole_seconds = time.monotonic() - began_seconds
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


def fail_and_go_on(bench: PackBench, files: Failing) -> bool:
    failed = False
    try:
        bench.work(files)
    except StorageError:
        failed = True
    assert failed == (files.left <= 0)
    if failed and not bench.is_finished:
        before = noted(bench.partial)
        assert bench.work() >= before
    bench.check()
    return files.left > 0


@pytest.mark.parametrize(("first", "code"), [(6, errno.EIO), (8, errno.ENOSPC)])
def test_some_steps_that_fail(bench: PackBench, first: int, code: int) -> None:
    step = first
    while not fail_and_go_on(bench, Failing(step, code)):
        step += 19
    assert step > 40


@pytest.mark.parametrize(("of", "least"), [("sync model-", 4), ("rename model-", 3)])
def test_every_file_that_cannot_be_synced_or_named(bench: PackBench, of: str, least: int) -> None:
    step = 1
    while not fail_and_go_on(bench, Failing(step, errno.EIO, of)):
        step += 1
    assert step > least


@pytest.mark.long
def test_every_step_that_fails(bench: PackBench) -> None:
    step = 1
    while not fail_and_go_on(bench, Failing(step, errno.EIO)):
        step += 1


@pytest.fixture
def disks(bench: PackBench) -> list[Tree]:
    """Give every disk that a power cut can leave."""
    files = Recorder(bench.root)
    bench.work(files)
    files.close_all()
    bench.check()
    return list(files.disks.values())


def go_on(bench: PackBench, disk: Tree) -> None:
    make(disk, bench.root)
    if not bench.is_finished:
        bench.work()
    bench.check()


def test_some_power_cuts(bench: PackBench, disks: list[Tree]) -> None:
    assert len(disks) > 60
    for disk in disks[::9]:
        go_on(bench, disk)


@pytest.mark.long
def test_every_power_cut(bench: PackBench, disks: list[Tree]) -> None:
    for disk in disks:
        go_on(bench, disk)
