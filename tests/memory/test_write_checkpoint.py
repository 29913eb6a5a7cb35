"""The checkpoint that demo and tests are run on: its size, its bytes, that it is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sealed import fingerprint
from transformers import AutoModelForCausalLM
from write_checkpoint import STAMP_NAME, shape_for, write_checkpoint

from diskoffload.errors import InvalidInputError, OutputExistsError

SMALL_BYTES = 4_000_000


@pytest.mark.parametrize("size_bytes", [SMALL_BYTES, 60_000_000, 200_000_000, 3 * 10**9, 10**11])
def test_the_size_is_about_what_was_asked_for(size_bytes: int) -> None:
    assert shape_for(size_bytes).size_bytes() == pytest.approx(size_bytes, rel=0.15)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="smallest has"):
        shape_for(1_000_000)


def test_transformers_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    assert write_checkpoint(path, SMALL_BYTES)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_its_weights_are_like_trained_ones(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", SMALL_BYTES)
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    matrices = {name: one.float() for name, one in weights.items() if one.dim() == 2}
    assert len(matrices) > 8
    for name, matrix in matrices.items():
        deviations = matrix.std(dim=1)
        assert 0.015 < matrix.std() < 0.027, name
        assert deviations.max() > 1.5 * deviations.min(), name
        assert len(torch.unique(matrix, dim=0)) == len(matrix), name
    first, second = (matrices[f"model.layers.0.mlp.{key}_proj.weight"] for key in ("gate", "up"))
    assert not torch.equal(first, second)


def test_the_finished_one_is_used_again(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert write_checkpoint(one, SMALL_BYTES)
    before = fingerprint(one)
    assert not write_checkpoint(one, SMALL_BYTES)
    assert fingerprint(one) == before
    assert write_checkpoint(two, SMALL_BYTES)
    assert [p.read_bytes() for p in sorted(one.iterdir())] == [
        p.read_bytes() for p in sorted(two.iterdir())
    ]


def test_an_unfinished_one_is_begun_anew(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoint.partial"
    partial.mkdir()
    (partial / STAMP_NAME).write_text(json.dumps({"shape": "another"}))
    (partial / "model.safetensors.partial").write_bytes(b"half")
    assert write_checkpoint(tmp_path / "checkpoint", SMALL_BYTES)
    assert not partial.exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint", "checkpoint.partial"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        with pytest.raises(OutputExistsError, match=name):
            write_checkpoint(tmp_path / "checkpoint", SMALL_BYTES)
        assert (folder / "thesis.txt").read_text() == "mine"
        (folder / "thesis.txt").unlink()
        folder.rmdir()
