"""Conversions that compute rather than move: transformers' own code makes the tensors.

Hardly a family of transformers has one, so here is one: rows stored apart from their lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import digests, load, save_model
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading

import diskoffload
from diskoffload.cache.disk_backing import DiskBacking

STORED = ("mlp.up_proj.direction", "mlp.up_proj.length")
MADE = "mlp.up_proj.weight"


class Multiply(core_model_loading.ConversionOps):
    """Row times length; lengths are powers of two, so that nothing is rounded."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        direction, length = (input_dict[pattern][0] for pattern in STORED)
        return {MADE: direction * length[:, None]}

    @property
    def reverse_op(self) -> core_model_loading.ConversionOps:
        return Divide()


class Divide(core_model_loading.ConversionOps):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        length = value.abs().amax(1).log2().ceil().exp2()
        return dict(zip(STORED, (value / length[:, None], length), strict=True))

    @property
    def reverse_op(self) -> core_model_loading.ConversionOps:
        return Multiply()


class OneWay(Multiply):
    @property
    def reverse_op(self) -> core_model_loading.ConversionOps:
        raise NotImplementedError("there is no way back")


class Failing(Multiply):
    def convert(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise ZeroDivisionError("never mind")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture
def source(dtype: torch.dtype, tmp_path: Path) -> Iterator[Path]:
    """Save a checkpoint whose every up projection is stored as two tensors."""
    name = "llama"
    known = conversion_mapping.get_checkpoint_conversion_mapping(name)
    register(Multiply())
    yield save_model("llama", tmp_path / "source", dtype)
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    getattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set()).discard(name)
    del cache[name]
    if known is not None:
        cache[name] = known


def register(operation: core_model_loading.ConversionOps) -> None:
    rule = core_model_loading.WeightConverter(list(STORED), [MADE], operations=[operation])
    # Not by the class's name, which early releases of transformers 5 do not look up.
    conversion_mapping.register_checkpoint_conversion_mapping("llama", [rule], overwrite=True)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("as_dtype", [None, torch.float16])
def test_values_are_those_of_from_pretrained(
    source: Path, tmp_path: Path, as_dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert f"model.layers.0.{STORED[0]}" in stored(source)
    before = digests(source)
    model = diskoffload.open_checkpoint(source, offload_dir=tmp_path / "off", dtype=as_dtype)
    assert "Multiply" in caplog.text
    assert "of disk in" in caplog.text
    same(model.state_dict(), load(source, dtype=as_dtype or "auto").state_dict())
    held = dict(model.model.layers[0].mlp.up_proj._parameters.held_items())["weight"]
    assert isinstance(held.backing, DiskBacking)
    assert held.backing.stored.shards[0].path.parent == tmp_path / "off"
    del held
    assert digests(source) == before


def test_saving_gives_the_checkpoints_own_tensors_again(
    source: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = diskoffload.open_checkpoint(source, offload_dir=tmp_path / "off")
    diskoffload.save_checkpoint(model, tmp_path / "same")
    same(stored(tmp_path / "same"), stored(source))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)
    expected = model.state_dict()
    diskoffload.save_checkpoint(model, tmp_path / "edited")
    edited = stored(tmp_path / "edited")
    assert edited.keys() == stored(source).keys()
    for name, value in stored(source).items():
        assert torch.equal(edited[name], value) != ("layers.1.mlp.up_proj" in name), name
    same(load(tmp_path / "edited").state_dict(), expected)
    model.save_pretrained(tmp_path / "pretrained")
    same(load(tmp_path / "pretrained").state_dict(), expected)
    half = diskoffload.open_checkpoint(
        source, offload_dir=tmp_path / "off", dtype=torch.float16, compression="zstd"
    )
    diskoffload.save_checkpoint(half, tmp_path / "half")
    same(stored(tmp_path / "half"), {k: v.half() for k, v in stored(source).items()})


def test_what_cannot_go_back_is_saved_under_the_models_names(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(OneWay())
    model = diskoffload.open_checkpoint(source, offload_dir=tmp_path / "off")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)
    caplog.set_level(logging.WARNING, "diskoffload")
    diskoffload.save_checkpoint(model, tmp_path / "out")
    assert "saved under the model's own names" in caplog.text
    names = stored(tmp_path / "out").keys()
    assert f"model.layers.1.{MADE}" in names
    assert f"model.layers.1.{STORED[0]}" not in names
    assert f"model.layers.0.{STORED[0]}" in names
    same(load(tmp_path / "out").state_dict(), model.state_dict())


def test_a_conversion_that_fails_is_named_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    register(Failing())
    with pytest.raises(diskoffload.UnsupportedTensorError, match="never mind"):
        diskoffload.open_checkpoint(source, offload_dir=tmp_path / "off")
    assert not (tmp_path / "off").exists()


class Unpad(core_model_loading.ConversionOps):
    """Leave out a last row."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any,
        full_layer_name: str,
        **others: Any,
    ) -> dict[str, Any]:
        wanted = model.get_parameter(full_layer_name)
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        return {MADE: value[: len(wanted)].to(wanted.dtype)}


@pytest.mark.parametrize("as_dtype", ["float32", "bfloat16"])
def test_what_a_model_leaves_out_of_a_tensor_is_saved_with_it(
    source: Path, as_dtype: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    conversion_mapping.register_checkpoint_conversion_mapping("llama", [], overwrite=True)
    save_model("llama", tmp_path / "plain", dtype)
    padded = {
        name.replace(MADE, "mlp.up_proj.padded"): torch.cat([value, value[:1] + 5])
        if MADE in name
        else value
        for name, value in stored(tmp_path / "plain").items()
    }
    for file in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        file.unlink()
    save_file(padded, source / "model.safetensors", metadata={"format": "pt"})
    rule = core_model_loading.WeightConverter(["mlp.up_proj.padded"], [MADE], operations=[Unpad()])
    conversion_mapping.register_checkpoint_conversion_mapping("llama", [rule], overwrite=True)
    wanted = getattr(torch, as_dtype)
    model = diskoffload.open_checkpoint(source, dtype=wanted)
    diskoffload.save_checkpoint(model, tmp_path / "same")
    same(stored(tmp_path / "same"), {name: value.to(wanted) for name, value in padded.items()})
    name = "model.layers.1.mlp.up_proj.padded"
    expected = padded[name].to(wanted)
    expected[:-1] *= 3
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)
    diskoffload.save_checkpoint(model, tmp_path / "edited")
    assert torch.equal(stored(tmp_path / "edited")[name], expected)
