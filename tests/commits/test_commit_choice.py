"""What a reopened model writes is compressed as its user says then."""

from __future__ import annotations

from pathlib import Path

import torch

import diskoffload
from diskoffload.inspect import inspect_path


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(4))).bfloat16()


def test_a_reopened_model_is_given_its_choice_anew(tmp_path: Path) -> None:
    model = diskoffload.offload_model(
        net(),
        "cpu",
        "disk",
        offload_dir=tmp_path / "o",
        compression=lambda name, _: name == "0.weight",
    )
    diskoffload.commit(model)
    model[0]._parameters.folder.close()
    del model
    again = diskoffload.reopen(
        tmp_path / "o", model=net(), compression=lambda name, _: name == "3.weight"
    )
    with torch.no_grad():
        again[3].weight.mul_(2)
        again[2].weight.mul_(2)
    diskoffload.commit(again)
    packed = {one.name for one in inspect_path(tmp_path / "o").tensors if one.compression}
    assert packed == {"0.weight", "3.weight"}
