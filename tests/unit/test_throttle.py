"""A disk made slower by the kernel: the tool that does it, and what compression="auto" finds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from throttle import throttled, why_not

from diskoffload.store.payoff import measure_payoff
from diskoffload.system.files import Files
from diskoffload.system.memory import anonymous
from diskoffload.system.portable import IS_LINUX

GROUPS = Path("/sys/fs/cgroup/blkio")


@pytest.fixture
def slow_path(disk_path: Path) -> Path:
    reason = why_not(disk_path)
    if reason is None and not IS_LINUX:
        reason = "direct reads are not to be made"
    if reason is not None:
        pytest.skip(f"a disk cannot be slowed here: {reason}")
    return disk_path


def test_direct_reads_are_slowed_and_all_is_put_back(slow_path: Path) -> None:
    path, nbytes = slow_path / "x", 4 << 20
    path.write_bytes(os.urandom(nbytes))
    own = Path("/proc/self/cgroup").read_text()
    buffer = anonymous(nbytes)
    files = Files()
    fd = files.open_past_cache(path)
    assert fd is not None
    with throttled(slow_path, 10_000_000):
        assert Path("/proc/self/cgroup").read_text() != own
        began_seconds = time.monotonic()
        files.read_blocks(fd, buffer.view(), 0, nbytes, path)
        seconds = time.monotonic() - began_seconds
    files.close(fd)
    assert seconds > 0.2  # unslowed it takes a hundredth of that; slowed, 0.4
    assert Path("/proc/self/cgroup").read_text() == own
    assert not list(GROUPS.glob("diskoffload-*"))


def test_compression_is_found_to_pay_on_a_slow_disk(slow_path: Path) -> None:
    with throttled(slow_path, 20_000_000):
        found = measure_payoff(slow_path, Files())
    assert found.is_past_cache
    assert found.reads < 40e6
    assert found.pays
