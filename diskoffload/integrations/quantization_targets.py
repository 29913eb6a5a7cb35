"""Which stored tensors are weight matrices to quantize, why the others not, and in which dtype."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diskoffload.errors import UnsupportedTensorError, listed
from diskoffload.integrations.quantization import Scheme
from diskoffload.integrations.transformers import build_meta_model, require_transformers
from diskoffload.integrations.transformers_conversion import (
    RecipeSet,
    StoredSpec,
    inverse_pieces,
    tensor_recipes,
)
from diskoffload.name_patterns import name_matcher
from diskoffload.store.recipe import Piece

_METHOD = "compressed-tensors"


@dataclass(frozen=True)
class Targets:
    """What is to be quantized.

    Attributes:
        weights: names of the stored weights, in the checkpoint's order.
        left: name -> why a stored tensor stays as it is.
        ignore: what ``config.json`` says is not quantized, sorted.
        dtypes: name -> the dtype in which a stored tensor is quantized, or copied. Another
            than the stored one only where a dtype was asked for.
    """

    weights: Mapping[str, None]
    left: Mapping[str, str]
    ignore: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]


def find_targets(
    folder: Path,
    stored: Mapping[str, StoredSpec],
    scheme: Scheme,
    ignore: Sequence[str],
    dtype: torch.dtype | None = None,
) -> Targets:
    """Sort a checkpoint's tensors into weights to quantize and tensors that stay.

    A weight is quantized if it is the matrix of a linear layer, or one of the matrices
    that transformers stacks into a mixture's fused experts.

    Args:
        folder: where ``config.json`` lies.
        stored: what the checkpoint holds.
        scheme: decides which shapes and dtypes can be.
        ignore: modules that stay: names, as stored or as in the model, or ``"re:"`` and a
            regular expression that matches a name from its start.
        dtype: floating dtype of the model, as for ``from_pretrained``; ``None`` leaves every
            tensor in the dtype in which it is stored.

    Raises:
        InvalidInputError: a pattern that cannot be read.
        CheckpointError: the model's class is unknown.
        UnsupportedTensorError: a result that transformers could not load.
    """
    patterns = [name_matcher(one, "ignore") for one in ignore]
    model = build_meta_model(folder, dtype=dtype)
    found = tensor_recipes(model, stored)
    users = inverse_pieces(found.recipes)
    dtypes = {name: spec.dtype for name, spec in stored.items()}
    if dtype is not None:
        dtypes = _loaded_dtypes(model, found, stored, dtype)
    weights: dict[str, None] = {}
    left: dict[str, str] = {}
    dense: list[str] = []
    experts_left: list[str] = []
    stacks_left: list[str] = []
    for name, spec in stored.items():
        uses = users.get(name, [])
        role = _role(model, uses)
        owners = sorted({one.rpartition(".")[0] for one in (name, *(use for use, _ in uses))})
        reason = role.reason or scheme.obstacle(name, spec.shape, dtypes[name])
        ignored = role.reason is None and any(fits(one) for fits in patterns for one in owners)
        if ignored:
            reason = "it is on the ignore list"
        elif role.is_stack:
            reason = "it is all experts of a layer in one tensor, and the format stores matrices"
        if reason is None:
            weights[name] = None
            continue
        left[name] = reason
        if role.is_matrix:
            dense += owners
        if role.is_stack:
            stacks_left += [] if ignored else [name]
        elif role.is_expert:
            experts_left.append(f"{name} ({reason})")
    if scheme.file_format == "pack-quantized":
        _refuse_experts(scheme, experts_left, stacks_left)
    # In one order, however the tensors lie in the files: their dtypes decide that, too.
    return Targets(weights, left, tuple(sorted(set(dense))), dtypes)


def _refuse_experts(scheme: Scheme, left: Sequence[str], stacks: Sequence[str]) -> None:
    """Refuse a mixture whose experts would be left, or could not be loaded again."""
    if left:
        # transformers stacks an expert's packed parts by name: what is not packed is dropped
        # without an error, or the load fails.
        raise UnsupportedTensorError(
            f"{len(left)} matrices of the experts would stay as they are, and transformers "
            f"cannot load a mixture whose experts are only partly {scheme.name}: "
            f"{listed(left)}; quantize all of them, or use FP8"
        )
    if stacks:
        raise UnsupportedTensorError(
            f"{len(stacks)} tensors hold all experts of a layer at once, and {scheme.name} is "
            f"stored matrix by matrix: {listed(stacks)}; to leave them as they are, which is most "
            "of such a model, ignore their modules: re:.*experts"
        )


def _loaded_dtypes(
    model: torch.nn.Module, found: RecipeSet, stored: Mapping[str, StoredSpec], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Find the dtype that each stored tensor has once ``from_pretrained(dtype=...)`` has read it.

    That is its model tensor's, which knows what must stay in float32; floats of 8 bits are
    widened like any other. Tensors that the model does not use are not read by transformers:
    they follow the dtype too, for vLLM uses some (layers that predict further tokens), except
    those of 8 bits, which nothing says how to read. What is no float stays as it is.
    """
    users = inverse_pieces({**found.recipes, **found.duplicates})
    tensors = model.state_dict(keep_vars=True)
    wide = _names_kept_wide(model, dtype)
    dtypes: dict[str, torch.dtype] = {}
    for name, spec in stored.items():
        uses = users.get(name)
        if uses is not None:
            # Of several, transformers goes by the first.
            wanted = tensors[uses[0][0]].dtype
        elif spec.dtype.itemsize == 1:
            wanted = spec.dtype
        else:
            wanted = torch.float32 if wide(name) else dtype
        both_float = spec.dtype.is_floating_point and wanted.is_floating_point
        dtypes[name] = wanted if both_float else spec.dtype
    return dtypes


def _names_kept_wide(model: Any, dtype: torch.dtype) -> Callable[[str], object]:
    """Give a test for the names that the model's class keeps in float32."""
    # Early releases of transformers 5 have an attribute instead of the method.
    read_plan = getattr(model, "_get_dtype_plan", None)
    globs = list(read_plan(dtype) if read_plan else model.dtype_plan)
    patterns = [re.compile(glob.replace("*", ".*")) for glob in globs]
    return lambda name: any(pattern.search(name) for pattern in patterns)


@dataclass(frozen=True)
class _Role:
    """What a stored tensor is to the model.

    Attributes:
        reason: why it is no weight to quantize, or ``None``.
        is_matrix: whether a reader of the result may take it for a linear layer's weight.
        is_expert: whether it is a part of a fused mixture.
        is_stack: whether it is the fused mixture itself, stored as it is in the model.
    """

    reason: str | None
    is_matrix: bool = False
    is_expert: bool = False
    is_stack: bool = False


def _role(model: torch.nn.Module, uses: Sequence[tuple[str, Piece]]) -> _Role:
    if not uses:
        return _Role("no tensor of the model is made of it")
    expert = stack = False
    for name, piece in uses:
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        tensor = getattr(owner, key)
        if isinstance(owner, torch.nn.Linear):
            if key != "weight":
                return _Role(f"it is the {key} of a linear layer")
        elif tensor.ndim == 3 and "expert" in owner_name.lower():
            if piece.is_whole and type(owner).__name__ in _classes_taken_apart():
                raise UnsupportedTensorError(
                    f"{piece.source!r} holds all experts of a layer at once; transformers reads "
                    f"quantized ones of {type(owner).__name__} only as separate matrices, and "
                    "taking them apart is not supported here; quantize it with llm-compressor"
                )
            expert = True
            stack = piece.is_whole
        else:
            # Routers are no linear layers to transformers, but to vLLM they are.
            router = tensor.ndim == 2 and not isinstance(owner, torch.nn.Embedding)
            kind = type(owner).__name__
            return _Role(f"it is the {key} of a module that is no linear layer ({kind})", router)
    return _Role(None, is_matrix=True, is_expert=expert, is_stack=stack)


def _classes_taken_apart() -> list[str]:
    """List the classes of experts that transformers replaces in any quantized model."""
    base = require_transformers("quantizers.base")
    patches: Mapping[str, Any] = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    return [name for name, one in patches.items() if _METHOD in one["quantization_methods"]]
