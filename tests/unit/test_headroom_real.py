"""Headroom on this machine, and in a real control group that only a child process joins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import diskoffload
from diskoffload.system.headroom import Headroom, machine_memory

MIB = 1 << 20
GIB = 1 << 30


def test_without_proc_psutil_alone_is_asked(tmp_path: Path) -> None:
    headroom = Headroom(refresh_seconds=0, proc=tmp_path / "none", sys=tmp_path / "none")
    total_bytes = psutil.virtual_memory().total
    assert headroom.limit_bytes() == total_bytes
    assert 0 < headroom.available_bytes() < total_bytes
    assert abs(headroom.available_bytes() - psutil.virtual_memory().available) < GIB
    assert headroom.explain() == "machine"


def test_here_and_now_is_within_the_machine() -> None:
    headroom = Headroom(refresh_seconds=0)
    machine = machine_memory()
    assert machine.available_bytes < machine.total_bytes == psutil.virtual_memory().total
    assert 0 < headroom.available_bytes() <= headroom.limit_bytes() <= machine.total_bytes


class RealGroup:
    """A control group of our own with a memory limit; processes join it, we never do."""

    def __init__(self, parent: Path, limit_file: str, limit_bytes: int) -> None:
        self.limit_file = limit_file
        self.directory = parent / f"headroom-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.directory.mkdir()
        try:
            (self.directory / limit_file).write_text(str(limit_bytes))
        except OSError:
            self.directory.rmdir()
            raise

    def remove(self) -> None:
        # The kernel may still be dropping the last process when its parent has reaped it.
        for _ in range(100):
            try:
                return self.directory.rmdir()
            except OSError:
                time.sleep(0.05)
        self.directory.rmdir()


def _memory_root() -> tuple[Path, str] | None:
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        return v1, "memory.limit_in_bytes"
    try:
        if "memory" in (v2 / "cgroup.subtree_control").read_text().split():
            return v2, "memory.max"
    except OSError:
        pass
    return None


@pytest.fixture
def real_group() -> Iterator[RealGroup]:
    root = _memory_root()
    if root is None:
        pytest.skip("no mounted memory controller that lets groups be made at its root")
    try:
        group = RealGroup(*root, limit_bytes=256 * MIB)
    except OSError as refused:
        pytest.skip(f"this machine lets us make no control group: {refused}")
    try:
        yield group
    finally:
        group.remove()


def _run_in(group: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a child that imports first, then joins the group: only its data counts."""
    preamble = (
        "import json, mmap, os, sys\n"
        "from pathlib import Path\n"
        "from diskoffload.system.headroom import Headroom\n"
        "MIB = 1 << 20\n"
        "Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "headroom = Headroom(refresh_seconds=0, proc='/proc')\n"
    )
    package = Path(diskoffload.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, "-c", preamble + script, str(group), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


_CACHE_FILE = """
# Written and flushed outside of the group's account would be cheaper to tell apart, but a
# file read twice through a mapping is the hard case: mapped, active, and still reclaimable.
def fill_cache(path):
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for _ in range(2):
        for offset in range(0, len(mapping), 4096):
            mapping[offset]
    return mapping
"""


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    path = tmp_path / "cold"
    with path.open("wb") as file:
        for _ in range(160):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
        # Pages that the parent read first would be charged to the parent.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_real_group_limit_anonymous_and_file_pages(real_group: RealGroup, cold_file: Path) -> None:
    script = _CACHE_FILE + (
        "found = {'limit': headroom.limit_bytes(), 'by': headroom.explain()}\n"
        "usage = Path(sys.argv[1], sys.argv[3])\n"
        "found['start'] = headroom.available_bytes()\n"
        "taken = bytearray(os.urandom(MIB) * 64)\n"
        "found['anonymous'] = headroom.available_bytes()\n"
        "used = int(usage.read_text())\n"
        "mapping = fill_cache(sys.argv[2])\n"
        "found['charged'] = int(usage.read_text()) - used\n"
        "found['file'] = headroom.available_bytes()\n"
        "print(json.dumps(found))\n"
    )
    usage = {"memory.max": "memory.current"}.get(real_group.limit_file, "memory.usage_in_bytes")
    result = _run_in(real_group.directory, script, str(cold_file), usage)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["limit"] == 256 * MIB
    assert found["by"] == f"cgroup {real_group.directory}"
    assert 240 * MIB < found["start"] <= 256 * MIB
    assert 60 * MIB < found["start"] - found["anonymous"] < 72 * MIB
    # The file is charged to the group, yet takes next to nothing from what can be had.
    assert found["charged"] > 150 * MIB
    assert abs(found["anonymous"] - found["file"]) < 8 * MIB


@pytest.mark.parametrize(("share", "survives"), [(0.9, True), (1.15, False)])
def test_real_group_can_truly_give_what_is_promised(
    real_group: RealGroup, cold_file: Path, share: float, survives: bool
) -> None:
    """With the group full of file pages, 90% of the promise is had; 115% is killed."""
    script = _CACHE_FILE + (
        "mapping = fill_cache(sys.argv[2])\n"
        "promised = headroom.available_bytes()\n"
        "print(promised, flush=True)\n"
        "taken = mmap.mmap(-1, int(promised * float(sys.argv[3])))\n"
        "for offset in range(0, len(taken), 4096):\n"
        "    taken[offset] = 1\n"
    )
    swap_bytes = psutil.swap_memory().total
    if swap_bytes and not survives:
        pytest.skip("with swap the group can be overdrawn without being killed")
    result = _run_in(real_group.directory, script, str(cold_file), str(share))
    assert 200 * MIB < int(result.stdout) <= 256 * MIB, result.stderr
    assert result.returncode == (0 if survives else -signal.SIGKILL), result.stderr


def test_real_group_shared_memory_is_not_free(real_group: RealGroup) -> None:
    script = (
        "before = headroom.available_bytes()\n"
        "shared = os.memfd_create('shared')\n"
        "os.write(shared, bytes(48 * MIB))\n"
        "print(before - headroom.available_bytes())\n"
    )
    result = _run_in(real_group.directory, script)
    assert result.returncode == 0, result.stderr
    assert 44 * MIB < int(result.stdout) < 60 * MIB


def test_real_nested_group_is_bound_by_its_parent(real_group: RealGroup) -> None:
    if real_group.limit_file == "memory.max":
        (real_group.directory / "cgroup.subtree_control").write_text("+memory")
    inner = RealGroup(real_group.directory, real_group.limit_file, 1024 * MIB)
    script = "print(headroom.limit_bytes(), headroom.available_bytes(), headroom.explain())\n"
    try:
        result = _run_in(inner.directory, script)
    finally:
        inner.remove()
    assert result.returncode == 0, result.stderr
    limit, available, by = result.stdout.strip().split(" ", 2)
    assert int(limit) == 256 * MIB
    assert 240 * MIB < int(available) <= 256 * MIB
    assert by == f"cgroup {real_group.directory}"
