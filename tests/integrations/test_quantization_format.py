"""Our streamed quantization against compressed-tensors on the model in memory, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor, compress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from models import skip_where_quantized_mixtures_do_not_load
from safetensors.torch import load_file, save_file

from diskoffload.errors import InvalidInputError
from diskoffload.integrations import quantization_arithmetic
from diskoffload.integrations.quantization import SCHEMES, Scheme, already_quantized, scheme_named

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SIZES |= {"num_hidden_layers": 2, "tie_word_embeddings": False}
EXPERTS: dict[str, Any] = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "mixtral": transformers.MixtralConfig(**EXPERTS),
    "qwen3_moe": transformers.Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=128),
}
# Where transformers 5 keeps an expert's matrices, stacked, and how checkpoints name them.
FUSED = {
    "mixtral": ("block_sparse_moe", {"gate_up_proj": "w1 w3", "down_proj": "w2"}),
    "qwen3_moe": ("mlp", {"gate_up_proj": "gate_proj up_proj", "down_proj": "down_proj"}),
}


def tiny_model(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[kind]), dtype=dtype)


def parsed(scheme: Scheme, status: str = "compressed") -> QuantizationConfig:
    """The configuration that we write, as compressed-tensors reads it."""
    settings = scheme.quantization_config(["lm_head"]) | {"quantization_status": status}
    return QuantizationConfig.model_validate(settings)


def calibrate(model: Any, scheme: Scheme) -> None:
    """Prepare every linear layer with compressed-tensors alone, scales from min and max."""
    apply_quantization_config(model, parsed(scheme, "initialized"))
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            arguments = layer.quantization_scheme.weights
            size = arguments.group_size or layer.in_features
            groups = layer.weight.detach().unflatten(-1, (-1, size))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            layer.weight_scale.data.copy_(scale)
            layer.weight_zero_point.data.copy_(zero)


def theirs(scheme: Scheme, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    layer: Any = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    calibrate(torch.nn.Sequential(layer), scheme)
    compress_module(layer)
    return {f"0.{key}": value.detach() for key, value in layer.state_dict().items()}


def dequantized(scheme: Scheme, stored: dict[str, torch.Tensor], layer: str) -> Any:
    own = {k.removeprefix(f"{layer}."): v for k, v in stored.items() if k.startswith(f"{layer}.")}
    compressor = BaseCompressor.get_value_from_registry(scheme.file_format)
    return compressor.decompress(own, parsed(scheme).config_groups["group_0"])["weight"]


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        ours, other = (t.contiguous().view(torch.uint8) for t in (got[name], value))
        assert torch.equal(ours, other), f"{name}: {int((ours != other).sum())} bytes differ"


def write_quantized(model: Any, scheme: Scheme, folder: Path) -> dict[str, torch.Tensor]:
    """Quantize what ``save_pretrained`` stores, tensor by tensor; the new folder is ``out``."""
    model.save_pretrained(folder / "source")
    source = load_file(folder / "source" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    left = [name for name in source if name.endswith((".gate.weight", "lm_head.weight"))]
    for name, value in source.items():
        linear = value.ndim == 2 and name not in [*left, "model.embed_tokens.weight"]
        stored.update(scheme.quantize(name, value) if linear else {name: value})
    ignored = [name.removesuffix(".weight") for name in left]
    config = json.loads((folder / "source" / "config.json").read_text())
    (folder / "out").mkdir()
    config["quantization_config"] = scheme.quantization_config(ignored)
    (folder / "out" / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "out" / "model.safetensors", metadata={"format": "pt"})
    return stored


def reload(folder: Path) -> Any:
    """Load with transformers alone and run once, which is when it decompresses the layers."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", output_loading_info=True
    )
    assert not any(found.values()), found
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    return model


def least_step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def hard_matrix(dtype: torch.dtype) -> torch.Tensor:
    """37 rows (no multiple of 8), some of them as awkward as finite numbers can be."""
    torch.manual_seed(1)
    weight = torch.randn(37, 384).mul_(0.02).to(dtype)
    weight[3] = 0
    weight[4, 128:256] = 0
    weight[5] = torch.finfo(dtype).smallest_normal
    weight[6] *= 1e-6
    weight[7] = -weight[7].abs()
    weight[8, ::2] = -0.0
    weight[9, 1] = torch.finfo(dtype).max
    weight[10, -1] = torch.finfo(dtype).min
    weight[11] = torch.linspace(-7.5, 7.5, 384).to(dtype)  # many exact halves
    # The largest is 11 of the least steps, a scale one of them: what is divided is out of range.
    weight[12] = (torch.arange(384) % 23 - 11).double().mul_(least_step(dtype)).to(dtype)
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_is_stored_and_reloaded_as_compressed_tensors_would(
    kind: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    scheme, model = scheme_named(name), tiny_model(kind, dtype)
    stored = write_quantized(model, scheme, tmp_path)

    calibrate(model, scheme)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    assert_same_bits(stored, {key: value.detach() for key, value in model.state_dict().items()})
    compressor.update_config(tmp_path / "source")
    expected = json.loads((tmp_path / "source" / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"] == expected["quantization_config"]
    assert already_quantized(written) == "compressed-tensors"

    loaded = reload(tmp_path).state_dict()
    layers = [key.removesuffix("_scale") for key in stored if key.endswith("_scale")]
    assert len(layers) == 14
    for weight in layers:
        layer = weight.removesuffix(".weight")
        assert_same_bits({layer: loaded[weight]}, {layer: dequantized(scheme, stored, layer)})


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", FUSED)
def test_experts_stored_apart_reload_into_the_fused_parameters(
    kind: str, name: str, tmp_path: Path
) -> None:
    skip_where_quantized_mixtures_do_not_load()
    scheme, model = scheme_named(name), tiny_model(kind, torch.bfloat16)
    stored = write_quantized(model, scheme, tmp_path)
    loaded = reload(tmp_path).state_dict()
    block, parts = FUSED[kind]
    for fused, matrices in parts.items():
        stack = loaded[f"model.layers.1.mlp.experts.{fused}"]
        assert len(stack) == 4
        for expert, got in enumerate(stack):
            stem = f"model.layers.1.{block}.experts.{expert}."
            pieces = [dequantized(scheme, stored, stem + part) for part in matrices.split()]
            assert_same_bits({fused: got}, {fused: torch.cat(pieces)})


def assert_same_as_theirs(scheme: Scheme, weight: torch.Tensor) -> None:
    got = scheme.quantize("0.weight", weight)
    assert_same_bits(got, theirs(scheme, weight))
    told = scheme.outputs("0.weight", weight.shape, weight.dtype)
    assert list(told.items()) == [(k, (v.dtype, tuple(v.shape))) for k, v in got.items()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_awkward_finite_weights_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    weight = hard_matrix(dtype)
    assert_same_as_theirs(scheme_named(name), weight)
    assert_same_bits({"source": weight}, {"source": hard_matrix(dtype)})


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 130])
def test_a_scale_for_each_row_takes_any_number_of_columns(columns: int) -> None:
    assert_same_as_theirs(scheme_named("FP8"), torch.randn(5, columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_nan_and_infinity_spoil_their_group_only_and_are_reported(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    scheme, weight = scheme_named(name), hard_matrix(dtype)
    clean = scheme.quantize("0.weight", weight)
    weight[20, 200], weight[21, 5], weight[22, 383] = float("nan"), float("inf"), -float("inf")
    got = scheme.quantize("0.weight", weight)
    total = got["0.weight_scale"].numel()
    (message,) = caplog.messages
    assert f"0.weight holds NaN or infinity: 3 of {total} scales" in message
    spoiled = torch.zeros(weight.shape, dtype=torch.bool)
    size = scheme.group_size or 384
    for row, column in ((20, 200), (21, 5), (22, 383)):
        spoiled[row, column // size * size : (column // size + 1) * size] = True
    now, then = dequantized(scheme, got, "0"), dequantized(scheme, clean, "0")
    assert torch.equal(now.isnan(), spoiled)
    assert torch.equal(now[~spoiled], then[~spoiled])
    # compressed-tensors ends the same way; only the sign of a float8 NaN may differ.
    expected = theirs(scheme, weight)
    reference = dequantized(scheme, expected, "0")
    assert torch.equal(now.nan_to_num(1), reference.nan_to_num(1))
    if scheme.number_type == "float":
        stored = got["0.weight"].float().isnan()
        assert torch.equal(stored, expected["0.weight"].float().isnan())
        assert stored.any()


@pytest.mark.parametrize("block", [1, 100, 128, 513, 1 << 10])
@pytest.mark.parametrize("name", SCHEMES)
def test_blocks_of_any_size_give_the_same_bits(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, weight = scheme_named(name), hard_matrix(torch.bfloat16)
    whole = scheme.quantize("0.weight", weight)
    monkeypatch.setattr(quantization_arithmetic, "_BLOCK_ELEMENTS", block)
    assert_same_bits(scheme.quantize("0.weight", weight), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_bands_of_any_rows_give_the_same_bits(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    scheme, weight = scheme_named(name), hard_matrix(dtype)
    weight[2, 3], weight[-1, 0] = -torch.inf, torch.inf  # of NaNs there are many
    whole = scheme.quantize("0.weight", weight)
    told = [record.getMessage() for record in caplog.records]
    for rows in (1, 2, 5, len(weight)):
        caplog.clear()
        one = scheme.begin("0.weight", weight.shape, dtype)
        parts = [one.add(weight[top : top + rows]).clone() for top in range(0, len(weight), rows)]
        main = next(iter(whole))
        got = {main: torch.cat(parts), **scheme.end("0.weight", weight.shape, one)}
        assert list(got) == list(whole)
        assert_same_bits(got, whole)
        assert [record.getMessage() for record in caplog.records] == told


@pytest.mark.parametrize("name", SCHEMES)
def test_strides_and_threads_do_not_matter(name: str) -> None:
    scheme, weight = scheme_named(name), hard_matrix(torch.float32)
    expected = scheme.quantize("0.weight", weight)
    wide = torch.zeros(74, 768)
    wide[::2, ::2] = weight
    views = [weight.t().contiguous().t(), wide[::2, ::2], torch.nn.Parameter(weight)] * 4
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda view: scheme.quantize("0.weight", view), views):
            assert_same_bits(got, expected)
            assert all(value.is_contiguous() for value in got.values())


def printed_by(program: str) -> str:
    return subprocess.check_output([sys.executable, "-c", program], text=True)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_working_memory_does_not_grow_with_the_weight() -> None:
    program = """
import torch
from diskoffload.integrations.quantization import SCHEMES, scheme_named
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10
weight = torch.ones(8192, 4096, dtype=torch.bfloat16)
for scheme in map(scheme_named, SCHEMES):
    stored = scheme.quantize("a.weight", weight[:64])
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    stored = scheme.quantize("a.weight", weight)
    print(status("VmHWM") - before - sum(value.nbytes for value in stored.values()))
"""
    used = [int(line) for line in printed_by(program).split()]
    # One copy of the weight alone would be 64 MiB.
    assert [each < 40 << 20 for each in used] == [True] * len(SCHEMES), used


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "reason"),
    [
        ((8, 200), torch.bfloat16, "a.weight", "200 columns"),
        ((4, 8, 128), torch.bfloat16, "a.weight", "3 dimensions"),
        ((0, 128), torch.bfloat16, "a.weight", "empty"),
        ((8, 128), torch.int8, "a.weight", "torch.int8"),
        ((8, 128), torch.float8_e4m3fn, "a.weight", "torch.float8_e4m3fn"),
        ((8, 128), torch.bfloat16, "a.experts.w1", "'.weight'"),
    ],
)
def test_what_cannot_be_quantized_says_why(
    shape: tuple[int, ...], dtype: torch.dtype, name: str, reason: str
) -> None:
    scheme = scheme_named("W4A16")
    assert reason in str(scheme.obstacle(name, shape, dtype))
    assert scheme.obstacle("a.weight", (8, 128), torch.bfloat16) is None
    with pytest.raises(InvalidInputError, match=f"'{name}' cannot be quantized to W4A16"):
        scheme.outputs(name, shape, dtype)
    with pytest.raises(InvalidInputError, match="leave it as it is"):
        scheme.quantize(name, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "preset"), [("W8A16", "W8A16"), ("W4A16", "W4A16"), ("FP8", "FP8_DYNAMIC")]
)
def test_a_scheme_is_the_preset_that_it_says(name: str, preset: str) -> None:
    expected = preset_name_to_scheme(preset, ["Linear"])
    expected.format = scheme_named(name).file_format
    assert parsed(scheme_named(name)).config_groups["group_0"] == expected


def test_schemes_are_found_by_name() -> None:
    weights = parsed(scheme_named("W8A16")).config_groups["group_0"].weights
    assert (weights.num_bits, weights.type, weights.strategy) == (8, "int", "group")
    assert [scheme_named(name.lower()).name for name in SCHEMES] == ["W8A16", "W4A16", "FP8"]
    with pytest.raises(InvalidInputError, match="'W3'; choose one of W8A16, W4A16, FP8"):
        scheme_named("W3")


@pytest.mark.parametrize("missing", ["compressed_tensors", "transformers"])
def test_a_missing_extra_is_named_when_first_needed(missing: str) -> None:
    program = f"""
import sys
sys.modules["{missing}"] = None
import torch
from diskoffload.errors import MissingExtraError
from diskoffload.integrations.quantization import scheme_named
scheme = scheme_named("W4A16")
scheme.outputs("a.weight", (8, 128), torch.float32)
for method, arguments in {{"quantize": ("a.weight", torch.ones(8, 128)),
                          "quantization_config": ([],)}}.items():
    try:
        getattr(scheme, method)(*arguments)
    except MissingExtraError as error:
        print(error)
"""
    causes = [line.partition("failed")[2] for line in printed_by(program).splitlines()]
    told = [missing in each and "pip install 'diskoffload[quantize]'" in each for each in causes]
    assert told == [True, True], causes


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"model_type": "llama", "text_config": {"rope_parameters": {"rope_theta": 1.0}}}, None),
        ({"quantization_config": None, "compression_config": {}}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"text_config": {"b": {"quantization_config": {"quant_method": "fp8"}}}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"compression_config": {"quantization_config": {"format": "x"}}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
    ],
)
def test_a_quantized_source_is_recognised(config: dict[str, Any], method: str | None) -> None:
    assert already_quantized(config) == method
