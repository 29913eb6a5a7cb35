"""A model run from compressed shards, in half of the memory that it takes uncompressed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from cgroup import MemoryCgroup
from sealed import Sealed, files_of_tensors, fingerprint, largest_layer_bytes
from test_cgroup_run import plain_outputs
from work_packed_in_group import KEPT_BYTES

import diskoffload
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.store.encoded import EncodedTensor

WORK = Path(__file__).with_name("work_packed_in_group.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_from_compressed_shards_in_half_the_size(
    large_checkpoint: Sealed,
    real_cgroup: Callable[[int], AbstractContextManager[MemoryCgroup]],
    disk_path: Path,
) -> None:
    source, packed = large_checkpoint.path, disk_path / "packed"
    command = [sys.executable, "-m", "diskoffload.cli", "pack", str(source), str(packed), "--json"]
    with real_cgroup(large_checkpoint.size_bytes // 2) as group:
        run = group.run(command, timeout_seconds=280)
        assert run.returncode == 0, run.stderr
        assert group.oom_kills() == 0
    made = json.loads(run.stdout)
    assert made["written_bytes"] <= 0.68 * made["read_bytes"]
    tensors = Checkpoint(packed).tensors
    matrices = [one for one in tensors.values() if len(one.shape) == 2]
    assert all(isinstance(one, EncodedTensor) for one in matrices)
    before = fingerprint(packed)
    Sealed(packed, 0, before).leave_page_cache()

    limit_bytes = large_checkpoint.size_bytes // 2
    command = [sys.executable, str(WORK), str(packed), str(disk_path / "offload")]
    with real_cgroup(limit_bytes) as group:
        run = group.run(command, timeout_seconds=280)
        assert run.returncode == 0, run.stderr
        assert group.oom_kills() == 0
    report = json.loads(run.stdout.splitlines()[-1])

    plain, doubled = plain_outputs(source)
    for found, expected in zip(report["outputs"], (plain, plain, doubled), strict=True):
        assert torch.equal(torch.tensor(found), expected)
    packed_bytes = sum(one.spec.nbytes for one in tensors.values())
    layer_bytes = largest_layer_bytes(files_of_tensors(source))
    baseline_bytes = report["passes"][0]["before_anonymous_bytes"]
    for taken, kept in zip(report["passes"], report["kept"], strict=True):
        # What is kept is within the budget, decoded, or the one layer that is larger than it is;
        # the rest is read packed, and once.
        assert kept <= max(KEPT_BYTES, layer_bytes)
        assert taken["read_bytes"] <= 1.05 * packed_bytes
        bound_bytes = baseline_bytes + KEPT_BYTES + layer_bytes + (64 << 20)
        assert taken["peak_anonymous_bytes"] <= bound_bytes
    assert fingerprint(packed) == before
    assert not diskoffload.verify(packed).faults
    assert large_checkpoint.is_unchanged()
