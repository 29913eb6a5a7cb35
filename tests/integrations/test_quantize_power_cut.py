"""Quantizing cut off by a power failure: what was not synced is lost, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from power_disks import Recorder, Tree, make
from quantize_bench import Bench, make_bench

from diskoffload.resumable import claim

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def planned(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(checkpoints["qwen3-tied"], tmp_path_factory.mktemp("bench"))


@pytest.fixture
def disks(planned: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tree]]:
    """Give every disk that a power cut can leave, of a run that notes its work seven times."""
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 16 << 10)
    files = Recorder(planned.root)
    planned.work(files)
    files.close_all()
    planned.check()
    yield list(files.disks.values())
    planned.clear()


def go_on(bench: Bench, disk: Tree) -> None:
    make(disk, bench.root)
    if not bench.is_finished:
        bench.work()
    bench.check()


def test_some_power_cuts(planned: Bench, disks: list[Tree]) -> None:
    assert len(disks) > 200
    last = len(disks) - 60  # of these the most are at steps that are done once
    for disk in disks[:last:13] + disks[last::3]:
        go_on(planned, disk)


@pytest.mark.long
def test_every_power_cut(planned: Bench, disks: list[Tree]) -> None:
    for disk in disks:
        go_on(planned, disk)
