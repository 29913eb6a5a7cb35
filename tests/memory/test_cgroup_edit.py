"""Adapters trained over a frozen base of twice the memory limit, and all of it then edited."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from cgroup import MemoryCgroup
from sealed import LIMIT_BYTES, Sealed
from transformers import AutoModelForCausalLM
from work_edit_in_group import TOKENS, adapt, double, train

WORK = Path(__file__).with_name("work_edit_in_group.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trains_adapters_and_edits_everything_within_the_limit(
    large_checkpoint: Sealed,
    real_cgroup: Callable[[int], AbstractContextManager[MemoryCgroup]],
    disk_path: Path,
) -> None:
    large_checkpoint.leave_page_cache()
    source = large_checkpoint.path
    with real_cgroup(LIMIT_BYTES) as group:
        command = [sys.executable, str(WORK), str(source), str(disk_path / "offload")]
        run = group.run(command, timeout_seconds=600)
        assert run.returncode == 0, run.stderr
        assert group.oom_kills() == 0
    report = json.loads(run.stdout.splitlines()[-1])
    # Frozen weights are mapped, also while autograd holds them: training wrote nothing.
    assert report["steps"]["train"]["written_bytes"] < 1 << 20
    assert large_checkpoint.is_unchanged()

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    losses = train(model, adapt(model))
    double(model)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS), use_cache=False).logits.float()
    assert report["losses"] == losses
    assert torch.equal(torch.tensor(report["logits"]), logits)
