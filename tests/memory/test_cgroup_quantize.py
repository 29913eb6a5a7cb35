"""Quantizing a checkpoint of twice the memory limit, by the command, in a real control group."""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from cgroup import GroupRun, MemoryCgroup
from page_cache import cached_pages
from sealed import LIMIT_BYTES, Sealed, files_of_tensors

from diskoffload.integrations.quantization import scheme_named

SCHEME = "W4A16"
PAGES_BYTES = 16 << 20  # what the kernel charges in batches, and so sees late


def quantize(group: MemoryCgroup, source: Path, out: Path, *options: str) -> GroupRun:
    command = [sys.executable, "-m", "diskoffload.cli", "quantize", str(source), str(out)]
    run = group.run([*command, "--scheme", SCHEME, "--json", *options], timeout_seconds=280)
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quantizes_twice_the_limit_with_some_of_a_weight_in_memory(
    large_checkpoint: Sealed,
    real_cgroup: Callable[[int], AbstractContextManager[MemoryCgroup]],
    disk_path: Path,
) -> None:
    out = disk_path / "out"
    files = list(large_checkpoint.path.glob("*.safetensors"))
    large_checkpoint.leave_page_cache()
    with real_cgroup(LIMIT_BYTES) as group:
        # The same process up to the point where the first weight would be touched.
        planning = quantize(group, large_checkpoint.path, out, "--dry-run")
        assert not out.exists()
        working = quantize(group, large_checkpoint.path, out)
        assert group.oom_kills() == 0
    plan = json.loads(planning.stdout)
    baseline_bytes = planning.peak_anonymous_bytes
    assert baseline_bytes is not None
    assert working.peak_anonymous_bytes is not None
    # The bound: the interpreter's own, and what the plan names.
    bound_bytes = baseline_bytes + plan["memory_bytes"] + PAGES_BYTES
    assert working.peak_anonymous_bytes <= bound_bytes
    assert plan["memory_bytes"] < 112 << 20
    # What was read does not take the page cache of others, within the limit or beyond.
    cached = [is_cached for file in files for is_cached in cached_pages(file)]
    assert sum(cached) * mmap.PAGESIZE < 32 << 20 < len(cached) * mmap.PAGESIZE
    assert large_checkpoint.is_unchanged()
    _check_result(out, large_checkpoint.path, plan)


def _check_result(out: Path, source: Path, plan: dict[str, Any]) -> None:
    assert not out.with_name("out.partial").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    before, after = files_of_tensors(source), files_of_tensors(out)
    scheme = scheme_named(SCHEME)
    expected: set[str] = set(plan["copied"])
    for name in plan["quantized"]:
        shape = before[name].get_slice(name).get_shape()
        expected |= scheme.outputs(name, shape, torch.bfloat16).keys()
    assert set(after) == expected
    assert len(plan["quantized"]) == 7 * config["num_hidden_layers"]
    # One weight of each kind, and a copied one: the bytes that lie where they should.
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.5.self_attn.k_proj.weight"):
        for key, value in scheme.quantize(name, before[name].get_tensor(name)).items():
            assert torch.equal(after[key].get_tensor(key), value)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(after[name].get_tensor(name), before[name].get_tensor(name))
