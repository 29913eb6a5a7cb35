"""One file larger than the machine's memory, most of it holes: it opens, and can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from linux_only import linux_only
from work_on_sparse import COLUMNS

from diskoffload.store.header import Header, build_header

WORK = Path(__file__).with_name("work_on_sparse.py")
PATTERN = [1.0, -2.0, 0.5, 384.0]
PATTERN_BYTES = bytes(torch.tensor(PATTERN, dtype=torch.bfloat16).view(torch.uint8).tolist())
# A package that read the file into memory would take the whole machine's; none may here.
MOST_BYTES = 2 << 30


@pytest.fixture
def sparse(disk_path: Path) -> tuple[Path, Header]:
    """Two tensors, together larger than memory and swap; each ends in four known numbers."""
    memory_bytes = psutil.virtual_memory().total + psutil.swap_memory().total
    rows = (memory_bytes + (8 << 30)) // (2 * COLUMNS * torch.bfloat16.itemsize)
    raw, header = build_header([(n, torch.bfloat16, (rows, COLUMNS)) for n in ("first", "second")])
    assert header.file_bytes > memory_bytes
    path = disk_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        try:
            file.truncate(header.file_bytes)
        except OSError as error:
            pytest.skip(f"the file system takes no file of {header.file_bytes} bytes: {error}")
        for spec in header.specs.values():
            os.pwrite(file.fileno(), PATTERN_BYTES, spec.offset + spec.nbytes - len(PATTERN_BYTES))
    if disk_bytes(path) > 1 << 20:
        pytest.skip("the file system has no sparse files")
    return path, header


def disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512  # the unit of stat(2), whatever the file system's


def run_guarded(*arguments: str) -> str:
    """Run the work, and end it before it takes more memory than can be spared."""
    with subprocess.Popen(
        [sys.executable, str(WORK), *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            memory = watched.memory_info()
            if memory.rss - getattr(memory, "shared", 0) > MOST_BYTES:
                process.kill()
                pytest.fail(f"it took more than {MOST_BYTES} bytes of memory, and was ended")
            time.sleep(0.005)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0
    return output


def added_bytes(taken: dict[str, Any]) -> int:
    return int(taken["peak_anonymous_bytes"] - taken["before_anonymous_bytes"])


@linux_only("without MAP_NORESERVE it is refused, and read instead")
def test_a_file_larger_than_memory_is_read_and_edited_in_place(sparse: tuple[Path, Header]) -> None:
    path, header = sparse
    modified_ns = path.stat().st_mtime_ns
    rows = header.specs["first"].shape[0]
    found = json.loads(run_guarded(str(path), str(rows)))
    for name in ("first", "second"):
        assert found[name] == {"shape": [rows, COLUMNS], "end": PATTERN, "middle": 0.0}
    assert found["edited"] == [*PATTERN[:2], 7.0, 7.0]
    # What is read costs nothing, what is edited its own pages.
    assert added_bytes(found["reading"]) < 16 << 20
    assert added_bytes(found["editing"]) < 16 << 20
    # The edit never reaches the file, whose holes stay holes.
    with path.open("rb") as file:
        for spec in header.specs.values():
            file.seek(spec.offset + spec.nbytes - len(PATTERN_BYTES))
            assert file.read(len(PATTERN_BYTES)) == PATTERN_BYTES
    assert disk_bytes(path) <= 1 << 20
    assert path.stat().st_mtime_ns == modified_ns
