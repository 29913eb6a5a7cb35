"""A model held in each of the ways that can be committed; what every test must leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commit_cases import Make, bare, seeded
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency.resident import Residency


@pytest.fixture(params=["scratch", "zstd", "opened"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(way: str, tmp_path: Path) -> Make:
    """Make a model that is offloaded to ``tmp_path / "off"``."""

    def scratch() -> torch.nn.Module:
        net, residency = seeded(), Residency()
        codec = "zstd" if way == "zstd" else None
        for name, module in net.named_modules():
            diskoffload.offload_module(
                module,
                "cpu",
                "disk",
                offload_dir=tmp_path / "off",
                name=name,
                residency=residency,
                compression=codec,
            )
        return net

    def opened() -> torch.nn.Module:
        checkpoint = tmp_path / "checkpoint"
        if not checkpoint.exists():
            checkpoint.mkdir()
            state = {k: v for k, v in seeded().state_dict().items() if k != "head.weight"}
            save_file(state, checkpoint / "model.safetensors")
        net = bare()
        net.table = torch.arange(16.0)
        return diskoffload.open_checkpoint(checkpoint, model=net, offload_dir=tmp_path / "off")

    return opened if way == "opened" else scratch


@pytest.fixture
def bare_again(way: str) -> Make:
    """Build the model as it was, without values."""

    def made() -> torch.nn.Module:
        net = bare()
        if way == "opened":
            net.table = torch.arange(16.0)
        return net

    return made


@pytest.fixture(autouse=True)
def nothing_scratch_is_left(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    request.node.funcargs.clear()
    gc.collect()
    folder = tmp_path / "off"
    if folder.exists() and not list(folder.glob("damaged")):
        assert not (folder / "diskoffload.lock").exists()
