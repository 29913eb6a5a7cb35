"""A user's own loop over a checkpoint of nearly twice the memory limit, really limited."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from cgroup import MemoryCgroup
from sealed import LIMIT_BYTES, Sealed, files_of_tensors, largest_layer_bytes

# torch and transformers take half of it; the checkpoint is nearly twice as large.
LOOP_LIMIT_BYTES = LIMIT_BYTES + (64 << 20)
WORK = Path(__file__).with_name("loop_in_group.py")
# Beside two layers, the old one's successor and the one waiting to be written: two groups of
# the writer at a sixteenth of what is available each, its buffers, the allocator's leftovers.
BUDGET_BYTES = LOOP_LIMIT_BYTES // 8 + (48 << 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replaces_every_weight_within_the_limit(
    large_checkpoint: Sealed,
    real_cgroup: Callable[[int], AbstractContextManager[MemoryCgroup]],
    disk_path: Path,
) -> None:
    large_checkpoint.leave_page_cache()
    source, out, offload = large_checkpoint.path, disk_path / "out", disk_path / "offload"
    command = [sys.executable, str(WORK), str(source), str(out), str(offload)]
    with real_cgroup(LOOP_LIMIT_BYTES) as group:
        run = group.run(command, timeout_seconds=280)
        assert run.returncode == 0, run.stderr
        assert group.oom_kills() == 0
    steps = json.loads(run.stdout.splitlines()[-1])
    before, after = files_of_tensors(source), files_of_tensors(out)
    bound_bytes = (
        steps["open"]["peak_anonymous_bytes"] + 2 * largest_layer_bytes(before) + BUDGET_BYTES
    )
    for step in ("loop", "save"):
        assert steps[step]["peak_anonymous_bytes"] <= bound_bytes, step
    assert large_checkpoint.is_unchanged()
    assert not offload.exists()  # scratch goes with its owner
    assert set(after) == set(before)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        factor = 1 if "norm" in name else 2
        old, new = before[name].get_tensor(name), after[name].get_tensor(name)
        assert torch.equal(factor * new, old), name
