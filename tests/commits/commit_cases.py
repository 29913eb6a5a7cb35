"""A model to commit, what it has, and what lies in its folder."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch


class Net(torch.nn.Module):
    """A tie, a buffer, one that is not saved, a bias that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 16)
        self.up = torch.nn.Linear(16, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.down = torch.nn.Linear(64, 16, bias=False)
        self.head = torch.nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((16,), 2.0))
        self.register_buffer("table", torch.arange(16.0), persistent=False)


def seeded() -> Net:
    torch.manual_seed(0)
    return Net()


def bare() -> Net:
    with torch.device("meta"):
        net = Net()
    return net


def values(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy all that the model has, also what a state dict leaves out."""
    named = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def check_values(net: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = values(net)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name
        assert torch.equal(found[name], value), name


Make = Callable[[], torch.nn.Module]


def names_in(folder: Path) -> list[str]:
    gc.collect()
    return sorted(path.name for path in folder.iterdir())


def shards_in(folder: Path) -> list[Path]:
    gc.collect()
    return sorted(folder.glob("diskoffload-*.safetensors*"))
