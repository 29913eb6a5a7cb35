"""Building without weights: its cost, its choice of a class, its refusals."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diskoffload.errors import CheckpointError, InvalidInputError
from diskoffload.integrations.transformers import build_meta_model
from diskoffload.integrations.transformers_tensors import compute_tensors, untie

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
_BUILD_70B = """
import json, sys, time
from pathlib import Path
from diskoffload.integrations.transformers import build_meta_model, require_transformers

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

require_transformers("models.llama.modeling_llama")
before, start = anonymous_bytes(), time.monotonic()
model = build_meta_model(Path(sys.argv[1]))
print(json.dumps({
    "seconds": time.monotonic() - start,
    "anonymous_bytes": anonymous_bytes() - before,
    "numel": sum(p.numel() for p in model.parameters()),
    "devices": sorted({p.device.type for p in model.parameters()}),
    "buffers": sorted({b.device.type for b in model.buffers()}),
}))
"""
_WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from pathlib import Path
from diskoffload.errors import MissingExtraError
from diskoffload.integrations import transformers, transformers_conversion
import torch
calls = (
    lambda: transformers.build_meta_model(Path(sys.argv[1])),
    lambda: transformers_conversion.tensor_recipes(torch.nn.Linear(1, 1), {}),
)
for call in calls:
    try:
        call()
    except MissingExtraError as error:
        assert "pip install 'diskoffload[transformers]'" in str(error)
        print("named")
"""


def _write(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _child(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_seventy_billion_parameters_cost_next_to_nothing(tmp_path: Path) -> None:
    big = {
        **_LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    }
    cost = json.loads(_child(_BUILD_70B, _write(tmp_path, **big)))
    assert cost["numel"] > 70e9
    assert cost["devices"] == ["meta"]
    assert cost["buffers"] == ["cpu"]
    assert cost["anonymous_bytes"] < 300e6
    assert cost["seconds"] < 5  # Measured: 0.3.


def test_without_transformers_only_its_use_fails(tmp_path: Path) -> None:
    assert _child(_WITHOUT_TRANSFORMERS, tmp_path).split() == ["named", "named"]


@pytest.mark.parametrize(
    ("architectures", "built"),
    [
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (["SomebodysForSequenceClassification"], "LlamaForSequenceClassification"),
        (["SomebodysForCausalLM"], "LlamaForCausalLM"),
        (["SomebodysModel"], "LlamaModel"),
        (None, "LlamaForCausalLM"),
    ],
)
def test_the_class_is_the_named_one_or_that_of_its_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architectures: list[str] | None, built: str
) -> None:
    with caplog.at_level(logging.WARNING):
        model = build_meta_model(_write(tmp_path, **_LLAMA, architectures=architectures))
    assert type(model).__name__ == built
    assert ("config.json names" in caplog.text) == (architectures != [built])


def test_without_an_architecture_an_encoder_stays_one(tmp_path: Path) -> None:
    assert type(build_meta_model(_write(tmp_path, model_type="bert"))).__name__ == "BertModel"


def test_a_composite_models_part_takes_its_part_of_the_configuration(tmp_path: Path) -> None:
    folder = _write(
        tmp_path,
        model_type="clip",
        architectures=["CLIPTextModel"],
        text_config={"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1},
    )
    model = build_meta_model(folder)
    assert (type(model).__name__, model.config.hidden_size) == ("CLIPTextModel", 64)


def test_a_given_dtype_reaches_every_part(tmp_path: Path) -> None:
    model = build_meta_model(_write(tmp_path, **_LLAMA, dtype="float32"), dtype=torch.float16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}
    assert model.config.dtype == torch.float16
    assert {tensor.dtype for tensor in model.buffers()} == {torch.float32}  # rotary tables


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nobodys", "auto_map": {"AutoConfig": "code.Config"}}, "never run"),
        (
            {
                **_LLAMA,
                "architectures": ["Own"],
                "auto_map": {"AutoModelForCausalLM": "code.Own"},
            },
            "never run",
        ),
        ({"model_type": "nobodys"}, "nobodys"),
        ({**_LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({**_LLAMA, "dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({**_LLAMA, "hidden_act": "nonsense"}, "nonsense"),
    ],
)
def test_unusable_configurations_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        build_meta_model(_write(tmp_path, **config))


def test_unusable_folders_and_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        build_meta_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_meta_model(tmp_path)
    with pytest.raises(InvalidInputError, match=r"torch\.int8"):
        build_meta_model(_write(tmp_path, **_LLAMA), dtype=torch.int8)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        build_meta_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
def test_a_table_that_the_models_code_forgets_is_zero_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    model = build_meta_model(_write(tmp_path, **_LLAMA))
    table = torch.empty(3, dtype=dtype, device="meta")
    model.register_buffer("forgotten", table, persistent=False)
    compute_tensors(model, ["forgotten"])
    assert torch.equal(model.forgotten, torch.zeros(3, dtype=dtype))
    assert "forgotten" in caplog.text


def test_only_parameters_can_be_untied(tmp_path: Path) -> None:
    model = build_meta_model(_write(tmp_path, **_LLAMA))
    with pytest.raises(InvalidInputError, match="nowhere"):
        untie(model, "nowhere.weight")
