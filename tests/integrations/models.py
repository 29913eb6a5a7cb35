"""Small models of the families that the tests run, with random weights, saved to a folder."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

FAMILIES = ("llama", "qwen3-tied", "mixtral", "qwen3-moe")
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2}


def config_of(family: str) -> Any:
    match family:
        case "llama":
            return transformers.LlamaConfig(**_SIZES)
        case "qwen3-tied":
            return transformers.Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)
        case "mixtral":
            return transformers.MixtralConfig(**_SIZES, **_EXPERTS, num_local_experts=4)
        case "qwen3-moe":
            return transformers.Qwen3MoeConfig(
                **_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=128, head_dim=32
            )
    raise AssertionError(family)


def save_model(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a checkpoint of several shards; give its folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family)).to(dtype)
    model.save_pretrained(folder, max_shard_size="300KB")
    return folder


def load(folder: Path, **options: Any) -> Any:
    """Load a checkpoint as transformers does, all of it in memory."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def skip_where_quantized_mixtures_do_not_load() -> None:
    """Skip a test where transformers has no ``dequantize``; it reads no packed experts then."""
    config = inspect.signature(transformers.utils.quantization_config.CompressedTensorsConfig)
    if "dequantize" not in config.parameters:
        pytest.skip(f"transformers {transformers.__version__} loads no compressed experts")


def digests(folder: Path) -> dict[str, str]:
    """Fingerprint every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
