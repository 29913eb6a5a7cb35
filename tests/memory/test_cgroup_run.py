"""Opening, running, editing and saving a checkpoint of twice the memory limit, really limited."""

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
from transformers import AutoModelForCausalLM
from work_in_group import EDITED, TOKENS

WORK = Path(__file__).with_name("work_in_group.py")
# Beside one layer: activations of a few tokens, a buffer to write through, and what the
# allocator keeps of both.
BUDGET_BYTES = 64 << 20


def plain_outputs(checkpoint: Path) -> list[torch.Tensor]:
    """Compute with the ordinary model, all of it in memory, what the limited one should."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    outputs = []
    with torch.no_grad():
        for factor in (1, 2):
            model.get_parameter(EDITED).mul_(factor)
            outputs.append(model(torch.tensor(TOKENS), use_cache=False).logits.float())
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_opens_runs_edits_and_saves_twice_the_limit(
    large_checkpoint: Sealed,
    real_cgroup: Callable[[int], AbstractContextManager[MemoryCgroup]],
    disk_path: Path,
) -> None:
    large_checkpoint.leave_page_cache()
    source, out = large_checkpoint.path, disk_path / "out"
    command = [sys.executable, str(WORK), str(source), str(out), str(disk_path / "offload")]
    with real_cgroup(LIMIT_BYTES) as group:
        run = group.run(command, timeout_seconds=280)
        assert run.returncode == 0, run.stderr
        assert group.oom_kills() == 0
    report = json.loads(run.stdout.splitlines()[-1])
    before, after = files_of_tensors(source), files_of_tensors(out)

    # The bound: the interpreter with an open model, one layer, and the budget.
    steps = report["steps"]
    baseline_bytes = steps["open"]["peak_anonymous_bytes"]
    bound_bytes = baseline_bytes + largest_layer_bytes(before) + BUDGET_BYTES
    for step in ("run", "edit", "run again", "save"):
        assert steps[step]["peak_anonymous_bytes"] <= bound_bytes, step
    assert run.peak_anonymous_bytes is not None
    assert run.peak_anonymous_bytes <= bound_bytes
    # Opening is metadata only; each pass read what memory had no room for, and wrote nothing.
    assert steps["open"]["read_bytes"] < large_checkpoint.size_bytes // 20
    for step in ("run", "run again"):
        assert steps[step]["read_bytes"] > large_checkpoint.size_bytes - LIMIT_BYTES
        assert steps[step]["written_bytes"] < 1 << 20

    assert large_checkpoint.is_unchanged()
    for found, expected in zip(report["outputs"], plain_outputs(source), strict=True):
        assert torch.equal(torch.tensor(found), expected)
    assert set(after) == set(before)
    for name, file in after.items():
        value = before[name].get_tensor(name)
        assert torch.equal(file.get_tensor(name), value * 2 if name == EDITED else value), name
