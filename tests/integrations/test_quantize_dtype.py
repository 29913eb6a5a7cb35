"""Quantizing into another dtype: as if the checkpoint had been stored in it, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import digests, load, save_model, skip_where_quantized_mixtures_do_not_load
from safetensors.torch import load_file, save_file

import diskoffload
from diskoffload import cli
from diskoffload.checkpoint.publish import RECORD_NAME
from diskoffload.quantize import (
    Interrupted,
    QuantizePlan,
    bands,
    convert,
    plan_quantization,
    quantize_checkpoint,
)
from diskoffload.quantize.convert import Conversion

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams

CHANGES = ((torch.float32, "bfloat16"), (torch.bfloat16, "float16"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, Any], Path]]:
    """Give checkpoints by family and stored dtype; no byte of them may change."""
    root = tmp_path_factory.mktemp("sources")
    kinds = [(f, d) for f in ("llama", "mixtral") for d in (torch.float32, torch.bfloat16)]
    made = {(f, d): save_model(f, root / f"{f}-{d}", d) for f, d in kinds}
    before = digests(root)
    yield made
    assert digests(root) == before


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        ours, other = (t.contiguous().view(-1).view(torch.uint8) for t in (got[name], value))
        assert torch.equal(ours, other), name


def compressed(weight: torch.Tensor, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Quantize and pack a matrix with compressed-tensors alone."""
    layer: Any = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    config = settings | {"quantization_status": "initialized", "ignore": []}
    apply_quantization_config(torch.nn.Sequential(layer), QuantizationConfig.model_validate(config))
    arguments = layer.quantization_scheme.weights
    groups = weight.unflatten(-1, (-1, arguments.group_size or weight.shape[1]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    layer.weight_scale.data.copy_(scale)
    compress_module(layer)
    return {key: value.detach() for key, value in layer.state_dict().items()}


def assert_as_loaded(source: Path, out: Path, model: Any, dtype: str, scheme: str) -> QuantizePlan:
    """Hold ``out`` against compressed-tensors, and against a checkpoint saved in that dtype."""
    plan = quantize_checkpoint(source, out, scheme, dtype=dtype).plan
    model.save_pretrained(out.with_name("plain"))
    plain = stored(out.with_name("plain"))
    settings = config_of(out)["quantization_config"]
    expected: dict[str, torch.Tensor] = {}
    for name, value in plain.items():
        if name in plan.quantized:
            owner = name.removesuffix("weight")
            expected |= {owner + key: part for key, part in compressed(value, settings).items()}
        else:
            expected[name] = value
    assert_same_bits(stored(out), expected)
    quantize_checkpoint(out.with_name("plain"), out.with_name("same"), scheme)
    assert_same_bits(stored(out), stored(out.with_name("same")))
    assert config_of(out) == config_of(out.with_name("same"))
    return plan


@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bits_are_those_of_the_model_loaded_in_that_dtype(
    sources: dict[Any, Path], family: str, change: Any, scheme: str, tmp_path: Path
) -> None:
    kept, dtype = change
    wanted = getattr(torch, dtype)
    source, out = sources[family, kept], tmp_path / "out"
    assert_as_loaded(source, out, load(source, dtype=wanted), dtype, scheme)
    assert config_of(out)["dtype"] == dtype
    if family == "mixtral":
        skip_where_quantized_mixtures_do_not_load()
    again = load(out)
    assert again.dtype == again.config.dtype == wanted
    assert again(torch.arange(8)[None]).logits.dtype == wanted


def test_what_transformers_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    router = transformers.Glm4MoeConfig(**sizes, **experts, head_dim=32)
    sizes = {"vocab_size": 96, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1}
    wide = transformers.T5Config(**sizes, num_heads=4)
    glm, t5 = transformers.Glm4MoeForCausalLM, transformers.T5ForConditionalGeneration
    for cls, config, kept, dtype, known in (
        (glm, router, torch.float32, "bfloat16", "mlp.gate.e_score_correction_bias"),
        (t5, wide, torch.bfloat16, "float16", "wo.weight_scale"),
    ):
        folder = tmp_path / dtype
        cls(config).to(kept).save_pretrained(folder / "source")
        model = cls.from_pretrained(folder / "source", dtype=getattr(torch, dtype))
        plan = assert_as_loaded(folder / "source", folder / "out", model, dtype, "W8A16")
        left_wide = {n for n, v in stored(folder / "out").items() if v.dtype == torch.float32}
        # Releases differ in what they keep (5.24: the router of a mixture as well).
        wide_now = {n for n, v in model.state_dict().items() if v.dtype == torch.float32}
        assert left_wide == {n + "_scale" if n in plan.quantized else n for n in wide_now}
        assert any(name.endswith(known) for name in left_wide)


def with_more(source: Path, folder: Path, more: dict[str, torch.Tensor]) -> Path:
    """Copy a checkpoint into one file, with some tensors more or others."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    save_file(stored(source) | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_integers_stay_and_eight_bits_go_as_transformers_has_them(
    sources: dict[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = "model.layers.0.mlp.up_proj.weight"
    more = {
        "more.ids": torch.arange(5),
        "more.mask": torch.tensor([True, False]),
        "more.head": torch.ones(3, 3, dtype=torch.bfloat16),
        "more.narrow": torch.ones(4).to(torch.float8_e5m2),
        narrow: stored(sources["llama", torch.bfloat16])[narrow].to(torch.float8_e4m3fn),
    }
    source = with_more(sources["llama", torch.bfloat16], tmp_path / "source", more)
    plan = quantize_checkpoint(source, tmp_path / "out", "W8A16", dtype="float16").plan
    found = stored(tmp_path / "out")
    for name in ("more.ids", "more.mask", "more.narrow"):
        assert found[name].dtype == more[name].dtype
    assert found["more.head"].dtype == torch.float16
    assert plan.converted[narrow] == "float8_e4m3fn to float16"
    warnings = [one.getMessage() for one in caplog.records if "8 bits" in one.getMessage()]
    assert len(warnings) == 1
    assert narrow in warnings[0]
    settings = config_of(tmp_path / "out")["quantization_config"]
    widened = load(source, dtype=torch.float16).get_parameter(narrow).detach()
    for key, value in compressed(widened, settings).items():
        assert torch.equal(found[narrow.removesuffix("weight") + key], value)
    # Asked for nothing, nothing is widened: a float of 8 bits is no weight to quantize.
    kept = quantize_checkpoint(source, tmp_path / "kept", "W8A16").plan
    assert kept.converted == {}
    assert stored(tmp_path / "kept")[narrow].dtype == torch.float8_e4m3fn


def test_every_part_of_the_configuration_follows(sources: dict[Any, Path], tmp_path: Path) -> None:
    source = with_more(sources["llama", torch.float32], tmp_path / "source", {})
    config = config_of(source) | {
        "torch_dtype": "float32",
        "a_config": {"dtype": "float32", "b_config": {"torch_dtype": None}, "size": 1},
        "c_config": {"vocabulary": {"dtype": 7}},
    }
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out", "FP8", dtype=torch.bfloat16)
    found = config_of(tmp_path / "out")
    assert found["dtype"] == found["torch_dtype"] == "bfloat16"
    parts = {"dtype": "bfloat16", "b_config": {"torch_dtype": "bfloat16"}, "size": 1}
    assert found["a_config"] == parts
    assert found["c_config"] == config["c_config"]
    quantize_checkpoint(source, tmp_path / "kept", "FP8")
    assert {k: v for k, v in config_of(tmp_path / "kept").items() if k in config} == config


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_dry_run_foretells_size_and_memory(
    sources: dict[Any, Path], change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, dtype = change
    source, out = sources["llama", kept], tmp_path / "out"
    command = ["quantize", str(source), str(out), "--scheme", "W4A16", "--dtype", dtype]
    assert cli.main([*command, "--dry-run"]) == 0
    assert f"{kept} to {dtype}".removeprefix("torch.") in capsys.readouterr().out
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert cli.main([*command, "--json"]) == 0
    assert plan.items() <= json.loads(capsys.readouterr().out).items()
    found = stored(out)
    assert plan["written_bytes"] == sum(value.nbytes for value in found.values())
    assert {found[name].dtype for name in plan["copied"]} == {getattr(torch, dtype)}
    assert plan["converted"].keys() == stored(source).keys()
    # A band of the largest weight, 256 x 128, is in memory once more where it is converted.
    as_stored = plan_quantization(source, tmp_path / "x", "W4A16").memory_bytes
    narrower_scales = 256 * (kept.itemsize - 2)
    assert plan["memory_bytes"] == as_stored - narrower_scales + 256 * 128 * 2


def but_for_the_job(result: Path) -> dict[str, str]:
    """Digest a result's files, without the one that says what it was made from."""
    found = digests(result)
    del found[RECORD_NAME]
    return found


def test_no_tensor_that_has_the_dtype_already_is_converted(
    sources: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["llama", torch.bfloat16]
    converted = {"bytes": 0}
    count_lost = convert._count_lost

    def counted(before: torch.Tensor, after: torch.Tensor) -> int:
        converted["bytes"] += before.nbytes
        return count_lost(before, after)

    monkeypatch.setattr(convert, "_count_lost", counted)
    plan = quantize_checkpoint(source, tmp_path / "out", "W4A16", dtype="bfloat16").plan
    assert converted == {"bytes": 0}
    quantize_checkpoint(source, tmp_path / "plain", "W4A16")
    assert but_for_the_job(tmp_path / "out") == but_for_the_job(tmp_path / "plain")
    quantize_checkpoint(source, tmp_path / "wide", "W4A16", dtype="float32")
    assert converted == {"bytes": plan.read_bytes}


@pytest.mark.parametrize("count", [1, 5, 12])
def test_an_interrupted_run_goes_on_in_its_own_dtype_only(
    sources: dict[Any, Path], tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_shard_size": "100KB", "dtype": "bfloat16"}
    source, out = sources["llama", torch.float32], tmp_path / "out"
    quantize_checkpoint(source, tmp_path / "whole", "W8A16", **options)
    monkeypatch.setattr(bands, "_BAND_ELEMENTS", 1000)
    answers = [False] * count + [True]
    with pytest.raises(Interrupted):
        quantize_checkpoint(source, out, "W8A16", **options, stop=lambda: answers.pop(0))
    for other in ("float16", "float32", None):
        with pytest.raises(diskoffload.OutputExistsError, match="dtype"):
            quantize_checkpoint(source, out, "W8A16", **{**options, "dtype": other})
    assert quantize_checkpoint(source, out, "W8A16", **options).resumed == count
    assert digests(out) == digests(tmp_path / "whole")


def test_an_error_within_a_tensor_loses_nothing(
    sources: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["mixtral", torch.float32]
    quantize_checkpoint(source, tmp_path / "whole", "FP8", dtype="float16")
    monkeypatch.setattr(bands, "_BAND_ELEMENTS", 5000)
    convert_band = Conversion.convert
    for stop_at in (3, 20, 40):
        left = [stop_at]

        def fail(self: Conversion, band: Any, left: list[int] = left) -> torch.Tensor:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return convert_band(self, band)

        monkeypatch.setattr(Conversion, "convert", fail)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "out", "FP8", dtype="float16")
    monkeypatch.setattr(Conversion, "convert", convert_band)
    quantize_checkpoint(source, tmp_path / "out", "FP8", dtype="float16")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_process_killed_within_a_tensor_goes_on_to_the_same_bytes(
    sources: dict[Any, Path], tmp_path: Path, number: int
) -> None:
    script = (
        "import sys, time; from diskoffload import cli\n"
        "from diskoffload.quantize import bands, convert\n"
        "bands._BAND_ELEMENTS = 4096\n"
        "inner = convert.Conversion.convert\n"
        "def slow(*a):\n"
        "    time.sleep(0.02); return inner(*a)\n"
        "convert.Conversion.convert = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    source, out = sources["llama", torch.float32], tmp_path / "out"
    options: dict[str, Any] = {"max_shard_size": "50KB", "dtype": "bfloat16"}
    arguments = ["quantize", str(source), str(out), "--scheme", "W4A16", "--dtype", "bfloat16"]
    command = [sys.executable, "-c", script, *arguments, "--max-shard-size", "50KB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.partial").glob("*-00003-of-*.safetensors")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert not out.exists()
    assert number == signal.SIGKILL or "the same command goes on from there" in errors
    assert quantize_checkpoint(source, out, "W4A16", **options).resumed > 0
    quantize_checkpoint(source, tmp_path / "whole", "W4A16", **options)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["int8", "float64", "auto", torch.float8_e4m3fn, torch.int32])
def test_other_dtypes_are_refused(sources: dict[Any, Path], tmp_path: Path, dtype: Any) -> None:
    source = sources["llama", torch.bfloat16]
    with pytest.raises(diskoffload.InvalidInputError, match="bfloat16, float16, float32"):
        quantize_checkpoint(source, tmp_path / "out", "W8A16", dtype=dtype)
    assert cli.main(["quantize", str(source), "out", "--scheme", "FP8", "--dtype", "int8"]) == 1
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_the_dtype_are_told(
    sources: dict[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    more = {name: stored(sources["llama", torch.bfloat16])[name].clone() for name in names}
    for value in more.values():
        value.view(-1)[:3] = torch.tensor([1e6, -1e6, float("inf")])
    source = with_more(sources["llama", torch.bfloat16], tmp_path / "source", more)
    quantize_checkpoint(source, tmp_path / "out", "FP8", dtype="float16")
    for name in names:
        assert f"{name}: 2 values are too large for float16" in caplog.text
    assert stored(tmp_path / "out")[names[0]][:2].tolist() == [float("inf"), -float("inf")]


def test_weights_at_odd_addresses_are_converted(sources: dict[Any, Path], tmp_path: Path) -> None:
    source = with_more(sources["llama", torch.float32], tmp_path / "source", {})
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    quantize_checkpoint(source, tmp_path / "even", "W4A16", dtype="bfloat16")
    (source / "model.safetensors").write_bytes(odd)
    quantize_checkpoint(source, tmp_path / "odd", "W4A16", dtype="bfloat16")
    assert but_for_the_job(tmp_path / "odd") == but_for_the_job(tmp_path / "even")
