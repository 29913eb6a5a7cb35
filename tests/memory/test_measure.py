"""What tools/measure.py says of work whose cost is known."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from measure import measured

from diskoffload.system.memory import anonymous

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only the seconds are known there")


def test_counts_what_was_read_and_written(disk_path: Path) -> None:
    path = disk_path / "file"
    with measured() as writing, path.open("wb") as file:
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with measured() as cold:
        path.read_bytes()
    with measured() as warm:
        path.read_bytes()
    assert writing.written_bytes is not None
    assert 8 * MIB <= writing.written_bytes < 9 * MIB
    assert cold.read_bytes is not None
    assert 8 * MIB <= cold.read_bytes < 9 * MIB
    assert warm.read_bytes == 0
    assert warm.read_call_bytes is not None
    assert 8 * MIB <= warm.read_call_bytes < 9 * MIB
    assert json.loads(json.dumps(cold.as_json()))["read_bytes"] == cold.read_bytes


def test_sees_anonymous_memory_that_is_gone_at_the_end() -> None:
    with measured() as taken:
        memory = anonymous(64 * MIB)
        memory.tensor(torch.uint8, (64 * MIB,)).fill_(1)
        time.sleep(0.1)  # some samples' time
        del memory
    assert taken.before_anonymous_bytes is not None
    assert taken.peak_anonymous_bytes is not None
    added_bytes = taken.peak_anonymous_bytes - taken.before_anonymous_bytes
    assert 60 * MIB <= added_bytes < 80 * MIB


def test_measures_work_that_fails() -> None:
    with pytest.raises(KeyError), measured() as taken:
        raise KeyError
    assert taken.seconds is not None
    assert taken.read_bytes is not None
