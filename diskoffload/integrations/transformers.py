"""Build the transformers model of a checkpoint without its weights.

The model's parameters lie on the meta device, whatever its size; only the small tables that no
checkpoint holds (rotary frequencies, position ids) are computed, by the model's own code. Which
stored tensors fill the rest is said by :mod:`diskoffload.integrations.transformers_conversion`.

transformers is optional and heavy to import, so it is imported at the first need, by
:func:`require_transformers` alone. It keeps global state while it builds a model: none of this
may run in two threads at once.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from diskoffload.errors import CheckpointError, InvalidInputError, MissingExtraError
from diskoffload.integrations.transformers_tensors import (
    compute_tensors,
    move_to_meta,
    non_persistent_buffers,
)

_log = logging.getLogger(__name__)

_DTYPE_BY_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The safetensors codes of the dtypes in which a whole model can be built."""

_TASKS_WITH_PROMPT = (
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
)


def require_transformers(submodule: str = "") -> Any:
    """Import transformers, or one of its submodules.

    Args:
        submodule: dotted name below ``transformers``; empty for the package itself.

    Raises:
        MissingExtraError: if it is not installed, cannot be imported, or is older than 5.
    """
    name = f"transformers.{submodule}" if submodule else "transformers"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"Importing {name!r} failed ({error}); transformers 5 or later is needed here: "
            "pip install 'diskoffload[transformers]'."
        ) from error


def build_meta_model(checkpoint_dir: Path, *, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Build a checkpoint's model with every parameter and persistent buffer on the meta device.

    The class is the one that ``config.json`` names, or else the one that transformers has for
    such a configuration; code that lies in the checkpoint is never run. Buffers that no
    checkpoint stores are CPU tensors with the values and dtypes that ``from_pretrained`` gives
    them. Tied tensors are one object. The model is in eval mode and has the generation
    configuration of the folder. No weight is read and no memory taken for one.

    Args:
        checkpoint_dir: folder with ``config.json``; nothing in it is changed.
        dtype: floating dtype of the parameters; ``None`` takes the configuration's, or else
            that of the first floating tensor that is stored. Whatever transformers keeps in
            float32 for the model's sake is float32 here, too.

    Raises:
        MissingExtraError: if transformers, or what else the model's class needs, is not there.
        InvalidInputError: if no model can be built in ``dtype``.
        CheckpointError: if the folder has no usable configuration, needs code of its own, or
            is quantized already.
    """
    if dtype is not None and dtype not in _DTYPE_BY_CODE.values():
        raise InvalidInputError(
            f"Building a model in dtype {dtype} was asked for; give one of "
            f"{', '.join(map(str, _DTYPE_BY_CODE.values()))}."
        )
    config = _load_config(checkpoint_dir)
    build, config = _find_builder(checkpoint_dir, config)
    if dtype is None:
        dtype = _checkpoint_dtype(checkpoint_dir, config)
    # Early releases of transformers 5 leave this to from_pretrained.
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    try:
        with torch.device("meta"):
            model: Any = build(config, dtype=dtype)
            model.tie_weights(recompute_mapping=False)
    except ImportError as error:
        raise MissingExtraError(
            f"Building the model of {checkpoint_dir} failed for want of a package that its class "
            f"needs: {str(error).strip()}"
        ) from error
    except Exception as error:  # Whatever the model's own code raises at a wrong configuration.
        raise CheckpointError(
            f"Building the model of {checkpoint_dir} from its config.json failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    move_to_meta(model)
    _keep_in_float32(model, dtype)
    compute_tensors(model, non_persistent_buffers(model))
    _load_generation_config(model, checkpoint_dir)
    model.eval()
    return cast(torch.nn.Module, model)


def require_pretrained(model: torch.nn.Module) -> None:
    """Check that a model is one of transformers'.

    Raises:
        MissingExtraError: if transformers is not installed.
        InvalidInputError: if it is not.
    """
    if not isinstance(model, require_transformers().PreTrainedModel):
        raise InvalidInputError(
            f"A transformers model was needed, {type(model).__name__} was given; bind other "
            "models to a checkpoint by name."
        )


def _load_config(checkpoint_dir: Path) -> Any:
    """Read ``config.json`` without running code from the folder."""
    auto_config = require_transformers().AutoConfig
    if not (checkpoint_dir / "config.json").is_file():
        raise CheckpointError(
            f"Opening {checkpoint_dir}, no config.json was found; give a checkpoint's folder."
        )
    try:
        config = auto_config.from_pretrained(
            str(checkpoint_dir), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds, KeyError among them.
        raise CheckpointError(
            f"Reading {checkpoint_dir / 'config.json'} failed: {error} (Code that comes with a "
            "checkpoint is never run: pass model= for one that transformers has no class for.)"
        ) from error
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{checkpoint_dir} is quantized already ({method or quantization}); open the "
            "checkpoint it was made from."
        )
    return config


def _find_builder(checkpoint_dir: Path, config: Any) -> tuple[Callable[..., Any], Any]:
    """Choose what builds the model, and the configuration that it takes."""
    transformers: Any = require_transformers()
    named = (getattr(config, "architectures", None) or [""])[0]
    found: Any = getattr(transformers, named, None) if named else None
    is_native = inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)
    if is_native:
        wanted = found.config_class
        if wanted is not None and not isinstance(config, wanted):
            # A part of a composite model, stored with the whole's configuration.
            config = wanted.from_pretrained(str(checkpoint_dir), local_files_only=True)
        return found._from_config, config
    if named and getattr(config, "auto_map", None):
        raise CheckpointError(
            f"{checkpoint_dir} needs the class {named!r}, which transformers "
            f"{transformers.__version__} does not have and the checkpoint brings as code; such "
            "code is never run: pass model=, built on the meta device."
        )
    auto_class = _auto_class(transformers, named, config)
    _log.warning(
        "%s names %s; %s chooses the class of its model",
        checkpoint_dir / "config.json",
        f"the unknown architecture {named!r}" if named else "no architecture",
        auto_class.__name__,
    )
    return auto_class.from_config, config


def _auto_class(transformers: Any, named: str, config: Any) -> Any:
    """Choose the automatic class by the task in an architecture's name, or by what there is."""
    task = re.search(r"For[A-Z]\w*$|LMHeadModel$", named)
    if task is None and named:
        candidates: tuple[str, ...] = ()
    elif task is None or task.group() == "ForConditionalGeneration":
        candidates = _TASKS_WITH_PROMPT
        # Encoders have a decoder's class, too, and are hardly ever meant to be one.
        if type(config) not in transformers.AutoModelForMaskedLM._model_mapping:
            candidates += ("AutoModelForCausalLM",)
    else:
        candidates = ("AutoModel" + task.group().replace("LMHeadModel", "ForCausalLM"),)
    for candidate in candidates:
        auto_class = getattr(transformers, candidate, None)
        if auto_class is not None and type(config) in auto_class._model_mapping:
            return auto_class
    return transformers.AutoModel


def _checkpoint_dtype(checkpoint_dir: Path, config: Any) -> torch.dtype:
    """Find the dtype a checkpoint is meant to be loaded in: ``dtype="auto"`` of transformers."""
    stated: Any = getattr(config, "dtype", None)
    if isinstance(stated, torch.dtype) and stated in _DTYPE_BY_CODE.values():
        return stated
    if stated is not None:
        raise CheckpointError(
            f"{checkpoint_dir / 'config.json'} states dtype {stated}, in which no model can be "
            "built; pass dtype=."
        )
    shard = checkpoint_dir / "model.safetensors"
    index = checkpoint_dir / "model.safetensors.index.json"
    try:
        if not shard.is_file() and index.is_file():
            shard = checkpoint_dir / min(json.loads(index.read_text())["weight_map"].values())
        if not shard.is_file():
            return torch.get_default_dtype()
        with safe_open(str(shard), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if found := _DTYPE_BY_CODE.get(stored.get_slice(name).get_dtype()):
                    return found
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"Reading the dtype of {shard} failed: {error}") from error
    return torch.get_default_dtype()


def _keep_in_float32(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Turn to float32 what the model's class says must not be narrower."""
    # Early releases of transformers 5 have an attribute instead of the method.
    read_plan: Any = getattr(model, "_get_dtype_plan", None)
    plan: Any = read_plan(dtype) if read_plan else model.dtype_plan
    patterns = [(re.compile(glob.replace("*", ".*")), wide) for glob, wide in plan.items()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        for pattern, wide in patterns:
            if pattern.search(name) and tensor.is_floating_point():
                # Through .data, so that the object, and with it every tie, stays.
                tensor.data = tensor.data.to(wide)
                break


def _load_generation_config(model: torch.nn.Module, checkpoint_dir: Path) -> None:
    """Read the folder's generation configuration into a model that generates."""
    if not model.can_generate():  # type: ignore[operator]
        return
    generation_config = require_transformers().GenerationConfig
    source: dict[str, Any] = {}
    if not (checkpoint_dir / "generation_config.json").is_file():
        # Older checkpoints keep these settings among the model's own.
        source = {"config_file_name": "config.json", "_from_model_config": True}
    model.generation_config = generation_config.from_pretrained(
        str(checkpoint_dir), local_files_only=True, **source
    )
