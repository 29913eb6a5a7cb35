"""Quantizing on a disk that fails or fills up: what was noted stays, and the work goes on."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from failing_files import Failing
from quantize_bench import Bench, make_bench, noted

from diskoffload.errors import NoSpaceError, StorageError
from diskoffload.resumable import claim

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def planned(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(checkpoints["qwen3-tied"], tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(planned: Bench) -> Iterator[Bench]:
    yield planned
    planned.clear()


def fail_and_go_on(bench: Bench, files: Failing) -> bool:
    failed = False
    try:
        bench.work(files)
    except StorageError:
        failed = True
    assert failed == (files.left <= 0)
    if failed and not bench.is_finished:
        before = noted(bench.partial)
        assert bench.work().resumed >= before
    bench.check()
    return files.left > 0


@pytest.fixture
def noting_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "NOTE_EVERY_BYTES", 40_000)


@pytest.mark.usefixtures("noting_often")
@pytest.mark.parametrize(("first", "code"), [(6, errno.EIO), (8, errno.ENOSPC)])
def test_some_steps_that_fail(bench: Bench, first: int, code: int) -> None:
    step = first
    while not fail_and_go_on(bench, Failing(step, code)):
        step += 29
    assert step > 60


@pytest.mark.usefixtures("noting_often")
@pytest.mark.parametrize(("of", "least"), [("sync model-", 6), ("rename model-", 3)])
def test_every_file_that_cannot_be_synced_or_named(bench: Bench, of: str, least: int) -> None:
    """What a failed sync lost is told of once; a file that has no name yet is whole."""
    step = 1
    while not fail_and_go_on(bench, Failing(step, errno.EIO, of)):
        step += 1
    assert step > least


@pytest.mark.long
@pytest.mark.usefixtures("noting_often")
def test_every_step_that_fails(bench: Bench) -> None:
    step = 1
    while not fail_and_go_on(bench, Failing(step, errno.EIO)):
        step += 1


def test_a_disk_that_fills_up_in_the_middle(bench: Bench, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        there = replace(bench, root=small)
        asked = [0]

        def fill() -> bool:
            asked[0] += 1
            if asked[0] == 10:
                with (small / "ballast").open("wb", buffering=0) as ballast:
                    while True:
                        try:
                            ballast.write(bytes(4096))
                        except OSError:
                            return False
            return False

        with pytest.raises(NoSpaceError, match="free some space"):
            there.work(stop=fill)
        assert noted(there.partial) in (0, 9)  # there may be no room for a note either
        with pytest.raises(NoSpaceError, match=r"too little|lock"):
            there.work()
        (small / "ballast").unlink()
        assert there.work().resumed == noted(there.partial) or there.is_finished
        there.check()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
