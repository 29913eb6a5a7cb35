"""The bound on anonymous memory, quickly: a smaller checkpoint, no control group needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sealed import files_of_tensors, fingerprint, largest_layer_bytes
from write_checkpoint import write_checkpoint

WORK = Path(__file__).with_name("work_in_group.py")
# Activations of a few tokens, a buffer to write through, and what the allocator keeps.
BUDGET_BYTES = 64 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is counted on Linux only")
def test_opening_running_editing_and_saving_take_one_layer_and_the_budget(disk_path: Path) -> None:
    source, out = disk_path / "source", disk_path / "out"
    write_checkpoint(source, 400_000_000)
    before = fingerprint(source)
    layer_bytes = largest_layer_bytes(files_of_tensors(source))
    assert layer_bytes + BUDGET_BYTES < 100_000_000  # a quarter of it, so the bound means much
    # A process of its own, because the allocator of this one may have room from before.
    ran = subprocess.run(
        [sys.executable, str(WORK), str(source), str(out), str(disk_path / "offload")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    steps = json.loads(ran.stdout.splitlines()[-1])["steps"]
    bound_bytes = steps["open"]["peak_anonymous_bytes"] + layer_bytes + BUDGET_BYTES
    for step in ("run", "edit", "run again", "save"):
        assert steps[step]["peak_anonymous_bytes"] <= bound_bytes, step
    for step in ("run", "edit", "run again"):
        assert steps[step]["written_bytes"] < 1 << 20, step
    assert set(files_of_tensors(out)) == set(files_of_tensors(source))
    assert fingerprint(source) == before
