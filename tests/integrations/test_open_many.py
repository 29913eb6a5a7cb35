"""What of a model is found and bound when a checkpoint is opened."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diskoffload
from diskoffload.checkpoint.slots import Slots

Model = torch.nn.Sequential


def stack(layers: int, side: int = 4) -> Model:
    return Model(*(torch.nn.Linear(side, side, device="meta") for _ in range(layers)))


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Model, dict[str, torch.Tensor]]:
    values = {name: torch.randn(one.shape) for name, one in stack(6).state_dict().items()}
    save_file(values, tmp_path / "model.safetensors")
    model = stack(6)
    diskoffload.open_checkpoint(tmp_path, model=model, offload_dir=tmp_path / "off")
    return model, load_file(tmp_path / "model.safetensors")


def test_the_first_to_be_expected_is_the_first_to_be_shown(
    opened: tuple[Model, dict[str, torch.Tensor]],
) -> None:
    model, _ = opened
    _ = model[4].weight
    cache: Any = model[0]._parameters
    entries = list(cache.residency._foresight.entries())
    mine = {id(one) for layer in model for one in layer._parameters._held.values()}
    shown = [one.name for one in entries if id(one) in mine]
    assert shown == [name for name, _ in model.named_parameters()]


def test_ties_are_made_at_once_and_keep_edits(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    model = Model(*(torch.nn.Linear(4, 4, bias=False, device="meta") for _ in range(2)))
    model[1].weight = model[0].weight
    diskoffload.open_checkpoint(tmp_path, model=model, offload_dir=tmp_path / "off")
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 4))
    gc.collect()
    assert torch.equal(model[1].weight, torch.full((4, 4), 2.0))


def test_a_parameter_taken_before_opening_finds_its_entry(tmp_path: Path) -> None:
    values = {name: torch.randn(one.shape) for name, one in stack(2).state_dict().items()}
    save_file(values, tmp_path / "model.safetensors")
    model = stack(2)
    taken = model[0].weight
    diskoffload.open_checkpoint(tmp_path, model=model, offload_dir=tmp_path / "off")
    model[1].weight = taken
    assert model[1].weight is model[0].weight
    assert torch.equal(model[1].weight, values["0.weight"])


class Renaming(torch.nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, f"{prefix}inner.", keep_vars)


def test_a_module_names_its_tensors_as_it_likes(tmp_path: Path) -> None:
    values = {"0.inner.weight": torch.randn(3, 3), "1.weight": torch.randn(3, 3)}
    save_file(values, tmp_path / "model.safetensors")
    options: dict[str, Any] = {"bias": False, "device": "meta"}
    model = Model(Renaming(3, 3, **options), torch.nn.Linear(3, 3, **options))
    assert Slots(model).tensors.keys() == model.state_dict().keys()
    diskoffload.open_checkpoint(tmp_path, model=model, offload_dir=tmp_path / "off")
    assert torch.equal(model[0].weight, values["0.inner.weight"])
    assert torch.equal(model[1].weight, values["1.weight"])


def test_slots_are_those_of_the_state_dict() -> None:
    shared = torch.nn.BatchNorm1d(3, device="meta")
    model = Model(shared, torch.nn.Linear(3, 3, device="meta"), shared)
    model.register_buffer("unsaved", torch.ones(1), persistent=False)
    slots, wanted = Slots(model), model.state_dict(keep_vars=True)
    assert list(slots.tensors) == list(wanted)
    assert all(slots.tensors[name] is one for name, one in wanted.items())
    assert [name for name, _ in slots.modules] == ["", "0", "1"]
    assert [name for name, _ in slots.unsaved_buffers()] == ["unsaved"]
