"""The configuration of a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diskoffload.quantize.plan import Job


def config_of_result(job: Job) -> dict[str, Any]:
    """Give the source's configuration with the result's dtype and how it was quantized."""
    config = dict(job.checkpoint.config)
    if job.plan.dtype is not None:
        config = _with_dtype(config, job.plan.dtype)
    config["quantization_config"] = job.scheme.quantization_config(job.targets.ignore)
    return config


def _with_dtype(config: Mapping[str, Any], dtype: str, *, whole: bool = True) -> dict[str, Any]:
    """Give a configuration that states another dtype: the whole always, a part where it did."""
    made = {
        key: _with_dtype(value, dtype, whole=False) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    for key in ("dtype", "torch_dtype"):
        # A vocabulary has numbers here (Emu3 has a token of that name).
        if key in made and (made[key] is None or _names_a_dtype(made[key])):
            made[key] = dtype
    return {**made, "dtype": dtype} if whole else made


def _names_a_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
