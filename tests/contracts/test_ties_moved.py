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


@pytest.mark.parametrize(
    ("mode", "seed"),
    [
        *(("mapped", seed) for seed in (3, 16, 28)),
        *(("streamed", seed) for seed in (102, 217, 235)),
    ],
)
@torch.no_grad()
def test_values_are_a_plain_models_whatever_is_tied(tmp_path: Path, mode: Any, seed: int) -> None:
    """A view that was given other memory was taken for a part of its root; roots had roots.

    And a root left without a view that had been given another part of its memory.
    """
    numbers = random.Random(seed)
    torch.manual_seed(seed)
    plain = layers().requires_grad_(False)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = layers().requires_grad_(False)
    model: Any = diskoffload.open_checkpoint(
        tmp_path, model=bare, offload_dir=tmp_path / "o", max_memory=12 << 20, mode=mode
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


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
@torch.no_grad()
def test_a_root_takes_along_a_view_that_was_turned(tmp_path: Path, mode: Any) -> None:
    """It left without the view, which kept the memory: edits of one were none of the other."""
    save_file(layers().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = layers().requires_grad_(False)
    model: Any = diskoffload.open_checkpoint(
        tmp_path, model=bare, offload_dir=tmp_path / "o", max_memory=8 << 20, mode=mode
    )
    first, second, others = model[0], model[1], model[2:]
    first.weight.data = second.weight.data
    assert all(layer.weight.any() for layer in others)  # which made room by what is not in use
    first.weight.data = second.weight.data.t()
    assert all(layer.weight.any() for layer in others)
    first.weight.data[3] = 7
    assert (second.weight[:, 3] == 7).all()
    assert all(layer.weight.any() for layer in others)
    assert torch.equal(first.weight, second.weight.t())
