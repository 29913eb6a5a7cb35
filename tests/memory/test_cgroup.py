"""The control groups of the other tests here: their limit is real, and they go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cgroup import MemoryCgroup

MakeGroup = Callable[[int], AbstractContextManager[MemoryCgroup]]


def test_the_limit_is_real(real_cgroup: MakeGroup) -> None:
    with real_cgroup(64 << 20) as group:
        fitting = group.run([sys.executable, "-c", "bytearray(16 << 20)"])
        assert (fitting.returncode, group.oom_kills()) == (0, 0)
        greedy = group.run([sys.executable, "-c", "bytearray(96 << 20)"])
        assert (greedy.returncode, group.oom_kills()) == (-9, 1)


def test_anonymous_memory_is_seen_from_outside(real_cgroup: MakeGroup) -> None:
    script = "import time; kept = bytearray(100 << 20); time.sleep(0.3)"
    with real_cgroup(256 << 20) as group:
        run = group.run([sys.executable, "-c", script])
    assert run.returncode == 0
    assert run.peak_anonymous_bytes is not None
    assert 100 << 20 <= run.peak_anonymous_bytes < 140 << 20


def test_a_group_goes_with_what_runs_in_it(real_cgroup: MakeGroup) -> None:
    groups: list[MemoryCgroup] = []
    pids: list[str] = []

    def fail_while_something_runs() -> None:
        with real_cgroup(64 << 20) as group:
            groups.append(group)
            run = group.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"])
            pids.append(run.stdout.strip())
            assert pids[0] in (group.directory / "cgroup.procs").read_text().split()
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_something_runs()
    assert not groups[0].directory.exists()
    status = Path(f"/proc/{pids[0]}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_command_that_takes_too_long_is_ended(real_cgroup: MakeGroup) -> None:
    with real_cgroup(64 << 20) as group:
        with pytest.raises(subprocess.TimeoutExpired):
            group.run(["sleep", "1000"], timeout_seconds=0.1)
        assert (group.directory / "cgroup.procs").read_text() == ""


def test_what_a_dead_process_left_is_swept(real_cgroup: MakeGroup) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    with real_cgroup(64 << 20) as group:
        parent = group.directory.parent
    stale, foreign = parent / f"diskoffload-{dead.pid}-0", parent / f"other-{dead.pid}-0"
    stale.mkdir()
    foreign.mkdir()
    try:
        with real_cgroup(64 << 20):
            assert not stale.exists()
            assert foreign.exists()
    finally:
        for left in (stale, foreign):
            if left.exists():
                left.rmdir()
