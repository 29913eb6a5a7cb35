"""Edits of a whole model in place take no more memory than the budget says, unasked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.store.folder import Folder
from diskoffload.system.memory import anonymous_bytes_of_process

COUNT, SIZE = 20, 2048  # 20 weights of 16 MiB
LAYER_BYTES = SIZE * SIZE * 4
BUDGET_BYTES = 4 * LAYER_BYTES
# Half the budget may be edited before anyone looks, and the process grow by 32 MiB; two
# groups of a layer are on their way to disk, one layer is at work, the allocator keeps some.
BOUND_BYTES = BUDGET_BYTES // 2 + (32 << 20) + 3 * LAYER_BYTES + (32 << 20)


@pytest.fixture(params=[None, "zstd"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> torch.nn.Module:
    weights = {f"{n}.weight": torch.full((SIZE, SIZE), float(n)) for n in range(COUNT)}
    save_file(weights, tmp_path / "m.safetensors")
    with torch.device("meta"):
        layers = [torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(COUNT)]
    return diskoffload.open_checkpoint(
        tmp_path / "m.safetensors",
        model=torch.nn.Sequential(*layers),
        offload_dir=Folder(tmp_path / "off", group_bytes=LAYER_BYTES),
        max_memory=BUDGET_BYTES,
        compression=request.param,
    )


def visit(model: torch.nn.Module, action: Callable[[torch.nn.Linear], object]) -> int:
    """Do something to every layer; give how much memory the process had more at most."""
    before = anonymous_bytes_of_process()
    assert before is not None
    most = before
    for layer in model:
        action(layer)
        most = max(most, anonymous_bytes_of_process() or 0)
    return most - before


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is counted on Linux only")
@torch.no_grad()
def test_nobody_has_to_sync(model: torch.nn.Module) -> None:
    assert BOUND_BYTES < COUNT * LAYER_BYTES * 2 // 3
    actions: list[Callable[[torch.nn.Linear], object]] = [
        lambda layer: layer.weight.sum(),  # all of it has been read before it is edited
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.view(-1)[::5000].zero_(),
        lambda layer: layer.double(),
        lambda layer: layer.half(),
        lambda layer: torch.nn.init.constant_(layer.weight, 3),
    ]
    for number, action in enumerate(actions):
        grown_bytes = visit(model, action)
        # Wide weights are twice as large, and so are groups of them.
        allowed_bytes = BOUND_BYTES * 2 if number >= 4 else BOUND_BYTES
        assert grown_bytes <= allowed_bytes, f"action {number}: {grown_bytes >> 20} MiB"
        if number == 3:
            for layer_number, layer in enumerate(model):
                weight = layer.weight.view(-1)
                assert weight[0] == weight[5000] == 0
                assert weight[1] == (layer_number + 1) * 2
            del weight
    for layer in model:
        assert layer.weight.dtype == torch.half
        assert (layer.weight == 3).all()
