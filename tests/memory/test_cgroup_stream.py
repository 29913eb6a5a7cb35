"""A model of twice the memory limit, run again and again: what is kept is not read again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from cgroup import MemoryCgroup
from safetensors.torch import save_file
from sealed import LIMIT_BYTES, fingerprint
from work_stream_in_group import KEPT_BYTES, LAYERS, WIDTH, make_model, output_of

from diskoffload.system.memory import can_discard

WORK = Path(__file__).with_name("work_stream_in_group.py")
MODEL_BYTES = LAYERS * WIDTH * WIDTH * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["streamed", "mapped"])
def test_each_pass_reads_what_was_not_kept(
    real_cgroup: Callable[[int], AbstractContextManager[MemoryCgroup]], disk_path: Path, mode: str
) -> None:
    if mode == "mapped" and not can_discard():
        pytest.skip("portable paths: nothing is dropped from the page cache")
    torch.manual_seed(0)
    model = make_model()
    source = disk_path / "checkpoint"
    source.mkdir()
    save_file(model.state_dict(), source / "model.safetensors")
    before = fingerprint(source)
    command = [sys.executable, str(WORK), str(source), str(disk_path / "offload"), mode]
    with real_cgroup(LIMIT_BYTES) as group:
        run = group.run(command, timeout_seconds=280)
        assert run.returncode == 0, run.stderr
        assert group.oom_kills() == 0
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["on"] == (mode == "streamed")  # it fits nowhere, and was given a budget
    first, *others = report["passes"]
    baseline_bytes = first["before_anonymous_bytes"]
    most_anonymous_bytes = KEPT_BYTES if mode == "streamed" else 0
    for number, (taken, kept) in enumerate(zip(report["passes"], report["kept"], strict=True)):
        if mode == "streamed":
            assert KEPT_BYTES // 2 < kept <= KEPT_BYTES
        else:
            assert LIMIT_BYTES // 3 < kept < LIMIT_BYTES
        most_bytes = baseline_bytes + most_anonymous_bytes + (32 << 20)
        assert taken["peak_anonymous_bytes"] <= most_bytes, number
    # Of mapped ones the huge pages are read, and kept, in which a neighbour begins or ends.
    share = 1.05 if mode == "streamed" else 1.1
    for taken, kept in zip(others, report["kept"], strict=False):
        assert taken["read_bytes"] <= share * (MODEL_BYTES - kept)
    output = output_of(model)
    if mode == "streamed":
        assert report["output"] == output
    else:  # mapped where the file has it, so that sums are made in another order
        assert report["output"] == pytest.approx(output, rel=0, abs=1e-4 * max(map(abs, output)))
    assert fingerprint(source) == before
