"""Mapped weights: the next ones are in the page cache before they are read, old ones leave it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from linux_only import linux_only
from page_cache import cached_pages
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency.allowance import Allowance
from diskoffload.store.header import LENGTH_BYTES

MIB = 1 << 20
WORK = Path(__file__).with_name("work_as_another_user.py")
LAYERS = 24
WIDTH = 1024  # 4 MiB each

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="asks Linux what is in its page cache"
)


def bare() -> torch.nn.Sequential:
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(24)))


@pytest.fixture
def checkpoint(disk_path: Path) -> Path:
    file = disk_path / "model.safetensors"
    weights = {f"{n}.weight": torch.full((WIDTH, WIDTH), float(n)) for n in range(LAYERS)}
    save_file(weights, file)
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return file


def cached_layers(file: Path) -> set[int]:
    """Find the layers of which a page in the middle is in the page cache; reads nothing."""
    flags = cached_pages(file)
    with file.open("rb") as opened:
        header_bytes = LENGTH_BYTES + int.from_bytes(opened.read(LENGTH_BYTES), "little")
    names = sorted(f"{n}.weight" for n in range(LAYERS))  # as save_file lays them out
    middles = [header_bytes + place * 4 * MIB + 2 * MIB for place in range(LAYERS)]
    return {
        int(name.partition(".")[0])
        for name, middle in zip(names, middles, strict=True)
        if flags[middle // mmap.PAGESIZE]
    }


def wait_for_ahead() -> None:
    until_seconds = time.monotonic() + 20
    while any(one.name == "diskoffload-ahead" for one in threading.enumerate()):
        assert time.monotonic() < until_seconds
        time.sleep(0.01)


def has_all_by(file: Path, wanted: set[int]) -> bool:
    until_seconds = time.monotonic() + 20  # it is asked for; the device takes its time
    while not wanted <= cached_layers(file) and time.monotonic() < until_seconds:
        time.sleep(0.02)
    return wanted <= cached_layers(file)


@linux_only("the kernel is asked for nothing ahead")
def test_what_comes_next_is_fetched(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = diskoffload.open_checkpoint(
        checkpoint, model=bare(), offload_dir=tmp_path / "offload", mode="mapped"
    )
    assert cached_layers(checkpoint) == set()
    model[0].weight  # noqa: B018 - nothing is touched, only asked for
    wait_for_ahead()
    assert has_all_by(checkpoint, set(range(1, 12)))
    for n in range(LAYERS):
        assert float(model[n].weight[3, 3]) == n
    wait_for_ahead()


@linux_only("nothing is dropped from the page cache")
def test_what_is_needed_last_leaves_the_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allowance, "free_bytes", lambda self: 50 * MIB)  # of 96
    model: Any = diskoffload.open_checkpoint(
        checkpoint, model=bare(), offload_dir=tmp_path / "offload", mode="mapped"
    )
    for _ in range(2):
        for n in range(LAYERS):
            assert float(model[n].weight.sum()) == n * WIDTH * WIDTH
    wait_for_ahead()
    left = cached_layers(checkpoint)
    # 6 to 10 layers, by how many huge pages neighbours share, and what was read ahead.
    assert 6 <= len(left) <= 21, left


@pytest.mark.slow
def test_pages_of_a_file_of_another_user_are_given_back(checkpoint: Path, tmp_path: Path) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    checkpoint.chmod(0o644)
    command = [sys.executable, str(WORK), str(checkpoint), str(tmp_path / "offload")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        said = run.stdout.readline()
        left = cached_layers(checkpoint)
        run.stdin.close()  # type: ignore[union-attr]
        assert said == "True\n", run.stderr.read()
    assert 6 <= len(left) <= 21, left


def test_an_edited_weight_never_leaves_with_the_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allowance, "free_bytes", lambda self: 20 * MIB)
    model: Any = diskoffload.open_checkpoint(
        checkpoint, model=bare(), offload_dir=tmp_path / "offload", mode="mapped"
    )
    kept = model[5].weight.detach()
    with torch.no_grad():
        model[2].weight[7, 7] = -1
    for _ in range(3):
        for n in range(LAYERS):
            assert float(model[n].weight[3, 3]) == n
    assert float(model[2].weight[7, 7]) == -1
    assert float(kept.sum()) == 5 * WIDTH * WIDTH
    wait_for_ahead()
