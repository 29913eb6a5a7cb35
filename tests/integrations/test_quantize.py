"""The quantize command: the same bits as compressed-tensors, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import digests, load, skip_where_quantized_mixtures_do_not_load
from safetensors.torch import load_file

import diskoffload
from diskoffload import cli
from diskoffload.quantize import Interrupted, plan_quantization, quantize_checkpoint

pytest.importorskip("compressed_tensors")
from compressed_tensors.quantization import (
    QuantizationArgs,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

PRESETS = {"W8A16": "W8A16", "W4A16": "W4A16", "FP8": "FP8_DYNAMIC"}
SCHEMES = tuple(PRESETS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def rounded(weight: torch.Tensor, arguments: QuantizationArgs) -> torch.Tensor:
    """Round a weight with compressed-tensors' own functions, scales included."""
    group = arguments.group_size if arguments.strategy == "group" else weight.shape[1]
    parts = weight.unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    scale, zero = calculate_qparams(low, high, arguments)
    return fake_quantize(weight, scale, zero, arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_equal_compressed_tensors_own(
    checkpoint: Path, family: str, scheme: str, tmp_path: Path
) -> None:
    skip_where_quantized_mixtures_do_not_load()
    assert cli.main(["quantize", str(checkpoint), str(tmp_path / "out"), "--scheme", scheme]) == 0
    arguments = preset_name_to_scheme(PRESETS[scheme], ["Linear"]).weights
    original = load(checkpoint).state_dict()
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    result = load(tmp_path / "out", quantization_config=config).state_dict()
    quantized = 0
    for name, value in original.items():
        matrices = value[None] if value.ndim == 2 else value
        is_expert = "experts" in name
        is_linear = name.endswith("proj.weight") and "norm" not in name
        if is_expert or is_linear:
            expected = torch.stack([rounded(matrix, arguments) for matrix in matrices])
            assert torch.equal(result[name], expected.reshape(value.shape)), name
            quantized += len(matrices)
        else:
            assert torch.equal(result[name], value), name
    assert quantized >= 14, family


def test_result_runs_compressed_in_transformers(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    quantize_checkpoint(checkpoints["llama"], tmp_path / "out", "W8A16")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        mine = load(tmp_path / "out")(ids).logits
        full = load(checkpoints["llama"])(ids).logits
    assert torch.nn.functional.cosine_similarity(mine, full, dim=-1).min() > 0.99


def test_experts_are_quantized_and_routers_are_not(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    quantize_checkpoint(checkpoints["mixtral"], tmp_path / "out", "W4A16")
    names = stored(tmp_path / "out")
    packed = [name for name in names if re.search(r"experts\.\d+\.w\d\.weight_packed", name)]
    assert len(packed) == 2 * 4 * 3
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert "model.layers.0.block_sparse_moe.gate" in ignore
    assert "lm_head" in ignore


def test_partly_quantized_experts_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(diskoffload.UnsupportedTensorError, match="cannot load a mixture"):
        quantize_checkpoint(
            checkpoints["mixtral"], tmp_path / "out", "W4A16", ignore=["re:.*experts.1.*"]
        )
    assert not list(tmp_path.iterdir())


def test_experts_stored_in_one_tensor_are_left_only_by_wish(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 32}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 1}
    left = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    left.save_pretrained(tmp_path / "left")
    with pytest.raises(diskoffload.UnsupportedTensorError, match=r"most of .* re:\.\*experts"):
        quantize_checkpoint(tmp_path / "left", tmp_path / "out", "W4A16")
    ignore = ["lm_head", "re:.*experts"]
    quantize_checkpoint(tmp_path / "left", tmp_path / "out", "W4A16", ignore=ignore)
    result = load(tmp_path / "out").state_dict()
    experts = {k: v for k, v in left.state_dict().items() if ".experts." in k}
    assert experts
    assert all(torch.equal(result[name], value) for name, value in experts.items())
    # transformers would look for these experts one by one, and make up what it does not find.
    config = transformers.Llama4TextConfig(**sizes, interleave_moe_layer_step=1)
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "apart")
    with pytest.raises(diskoffload.UnsupportedTensorError, match="only as separate matrices"):
        quantize_checkpoint(tmp_path / "apart", tmp_path / "new", "FP8", ignore=ignore)


def test_ignore_takes_names_and_patterns(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_quantization(
        checkpoints["llama"], tmp_path / "out", "FP8", ignore=["re:.*layers.0.*", "o_proj"]
    )
    assert "lm_head.weight" in plan.quantized
    assert not [name for name in plan.quantized if "layers.0" in name or "o_proj" in name]
    assert plan.copied["model.layers.1.self_attn.o_proj.weight"] == "it is on the ignore list"
    with pytest.raises(diskoffload.InvalidInputError, match="cannot be read"):
        plan_quantization(checkpoints["llama"], tmp_path / "out", "FP8", ignore=["re:("])


def test_dry_run_foretells_the_result(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(checkpoints["llama"]), str(tmp_path / "out"), "--scheme", "w4a16"]
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert cli.main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["seconds"] > 0
    assert {key: done[key] for key in plan} == plan
    assert plan["written_bytes"] == sum(v.nbytes for v in stored(tmp_path / "out").values())
    assert plan["read_bytes"] == sum(v.nbytes for v in stored(checkpoints["llama"]).values())
    assert cli.main([*command[:2], str(tmp_path / "other"), *command[3:], "--dry-run"]) == 0
    assert "tensors stay" in capsys.readouterr().out


def test_bad_requests_are_one_clear_line(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoints["llama"])
    out = str(tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert cli.main(["quantize", source, out, "--scheme", "FP8", "--ignore", ""]) == 0
    capsys.readouterr()
    requests = {
        "unknown scheme 'W3'": [source, str(tmp_path / "a"), "--scheme", "W3"],
        "does not exist": [str(tmp_path / "nowhere"), str(tmp_path / "a"), "--scheme", "FP8"],
        "is not empty": [source, str(tmp_path / "taken"), "--scheme", "FP8"],
        "quantized already, by compressed-tensors": [
            out,
            str(tmp_path / "a"),
            "--scheme",
            "FP8",
        ],
        "at least and max_memory is": [
            source,
            str(tmp_path / "a"),
            "--scheme",
            "FP8",
            "--max-memory",
            "1MiB",
        ],
    }
    for message, arguments in requests.items():
        assert cli.main(["quantize", *arguments]) == 1
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]


def test_too_little_disk_is_found_before_anything_is_written(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        with pytest.raises(diskoffload.NoSpaceError, match="too little"):
            quantize_checkpoint(checkpoints["llama"], small / "out", "W8A16")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _stop_after(count: int) -> Any:
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > count

    return stop


@pytest.mark.parametrize("count", [0, 1, 7, 15])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, count: int
) -> None:
    options: dict[str, Any] = {"max_shard_size": "100KB"}
    source = checkpoints["qwen3-tied"]
    quantize_checkpoint(source, tmp_path / "whole", "W4A16", **options)
    with pytest.raises(Interrupted, match="the same command goes on"):
        quantize_checkpoint(source, tmp_path / "out", "W4A16", **options, stop=_stop_after(count))
    assert not (tmp_path / "out").exists()
    if count:
        with pytest.raises(diskoffload.OutputExistsError, match="scheme was W4A16 and is FP8"):
            quantize_checkpoint(source, tmp_path / "out", "FP8", **options)
    result = quantize_checkpoint(source, tmp_path / "out", "W4A16", **options)
    assert result.resumed == count
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_resumed_run_that_fails_can_be_resumed(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints["llama"]
    with pytest.raises(Interrupted):
        quantize_checkpoint(source, tmp_path / "out", "FP8", stop=_stop_after(6))

    def fail() -> bool:
        if asked.pop():
            raise ZeroDivisionError
        return False

    asked = [True, False, False]
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(source, tmp_path / "out", "FP8", stop=fail)
    result = quantize_checkpoint(source, tmp_path / "out", "FP8")
    assert result.resumed == 8
    quantize_checkpoint(source, tmp_path / "whole", "FP8")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_killed_command_goes_on(
    checkpoints: dict[str, Path], tmp_path: Path, number: int
) -> None:
    """A real process, stopped by a real signal in the middle of its work."""
    script = (
        "import sys, time; from diskoffload import cli\nfrom diskoffload.quantize import run\n"
        "inner = run._Work._write\n"
        "def slow(self, *a):\n"
        "    time.sleep(0.08); inner(self, *a)\n"
        "run._Work._write = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    source, out = checkpoints["llama"], tmp_path / "out"
    arguments = ["quantize", str(source), str(out), "--scheme", "W4A16", "--max-shard-size", "50KB"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.partial").glob("*-00002-of-*.safetensors")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert not out.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in errors
    result = quantize_checkpoint(source, out, "W4A16", max_shard_size="50KB")
    assert result.resumed > 0
    quantize_checkpoint(source, tmp_path / "whole", "W4A16", max_shard_size="50KB")
    assert digests(out) == digests(tmp_path / "whole")


def test_inspect_lists_a_checkpoint_and_an_offload_folder(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(checkpoints["llama"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["shards"] == 3
    names = {tensor["name"] for shard in found["shards"] for tensor in shard["tensors"]}
    assert names == set(stored(checkpoints["llama"]))
    model = diskoffload.open_checkpoint(
        checkpoints["llama"], offload_dir=tmp_path / "off", compression="zstd"
    )
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(256, 128))
    model.lm_head._parameters.sync()
    assert cli.main(["inspect", str(tmp_path / "off")]) == 0
    table = capsys.readouterr().out
    assert re.search(r"lm_head\.weight\s+float32\s+256x128\s+\d+ B\s+\d+\s+zstd 0\.0", table)
    script = Path(__file__).parents[2] / "tools" / "inspect_shards.py"
    run = subprocess.run(
        [sys.executable, script, str(tmp_path / "off"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout)["totals"]["tensors"] == 1
    (tmp_path / "off" / "cut.safetensors").write_bytes(b"123")
    assert cli.main(["inspect", str(tmp_path / "off")]) == 1
    assert "cut.safetensors" in capsys.readouterr().out
    (tmp_path / "off" / "cut.safetensors").unlink()
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 1
