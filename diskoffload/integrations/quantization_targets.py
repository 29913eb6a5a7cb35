"""Which stored tensors of a checkpoint are weight matrices to quantize, and why the others not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diskoffload.errors import InvalidInputError, UnsupportedTensorError, listed
from diskoffload.integrations.quantization import Scheme
from diskoffload.integrations.transformers import build_meta_model
from diskoffload.integrations.transformers_conversion import (
    StoredSpec,
    inverse_pieces,
    tensor_recipes,
)
from diskoffload.store.recipe import Piece

_PATTERN = "re:"


@dataclass(frozen=True)
class Targets:
    """What is to be quantized.

    Attributes:
        weights: names of the stored weights, in the checkpoint's order.
        left: name -> why a stored tensor stays as it is.
        ignore: what ``config.json`` says is not quantized.
    """

    weights: Mapping[str, None]
    left: Mapping[str, str]
    ignore: tuple[str, ...]


def find_targets(
    folder: Path, stored: Mapping[str, StoredSpec], scheme: Scheme, ignore: Sequence[str]
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

    Raises:
        InvalidInputError: a pattern that cannot be read.
        CheckpointError: the model's class is unknown.
        UnsupportedTensorError: a result that transformers could not load.
    """
    patterns = [_compiled(one) for one in ignore]
    model = build_meta_model(folder)
    users = inverse_pieces(tensor_recipes(model, stored).recipes)
    weights: dict[str, None] = {}
    left: dict[str, str] = {}
    dense: list[str] = []
    experts_left: list[str] = []
    for name, spec in stored.items():
        uses = users.get(name, [])
        role = _role(model, uses)
        owners = sorted({one.rpartition(".")[0] for one in (name, *(use for use, _ in uses))})
        reason = role.reason or scheme.obstacle(name, spec.shape, spec.dtype)
        if role.reason is None and any(fits(one) for fits in patterns for one in owners):
            reason = "it is on the ignore list"
        if reason is None:
            weights[name] = None
            continue
        left[name] = reason
        if role.is_matrix:
            dense += owners
        if role.is_expert:
            experts_left.append(f"{name} ({reason})")
    if experts_left and scheme.file_format == "pack-quantized":
        # transformers stacks an expert's packed parts by name: what is not packed is dropped
        # without an error, or the load fails.
        raise UnsupportedTensorError(
            f"{len(experts_left)} matrices of the experts would stay as they are, and transformers "
            f"cannot load a mixture whose experts are only partly {scheme.name}: "
            f"{listed(experts_left)}; quantize all of them, or use FP8"
        )
    return Targets(weights, left, tuple(dict.fromkeys(dense)))


def _compiled(entry: str) -> Callable[[str], object]:
    if not entry.startswith(_PATTERN):
        return lambda owner: owner == entry or owner.endswith(f".{entry}")
    try:
        return re.compile(entry.removeprefix(_PATTERN)).match
    except re.error as error:
        raise InvalidInputError(f"the ignore pattern {entry!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Role:
    """What a stored tensor is to the model.

    Attributes:
        reason: why it is no weight to quantize, or ``None``.
        is_matrix: whether a reader of the result may take it for a linear layer's weight.
        is_expert: whether it is a part of a fused mixture.
    """

    reason: str | None
    is_matrix: bool = False
    is_expert: bool = False


def _role(model: torch.nn.Module, uses: Sequence[tuple[str, Piece]]) -> _Role:
    if not uses:
        return _Role("no tensor of the model is made of it")
    expert = False
    for name, _ in uses:
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        tensor = getattr(owner, key)
        if isinstance(owner, torch.nn.Linear):
            if key != "weight":
                return _Role(f"it is the {key} of a linear layer")
        elif tensor.ndim == 3 and "expert" in owner_name.lower():
            expert = True
        else:
            # Routers are no linear layers to transformers, but to vLLM they are.
            router = tensor.ndim == 2 and not isinstance(owner, torch.nn.Embedding)
            kind = type(owner).__name__
            return _Role(f"it is the {key} of a module that is no linear layer ({kind})", router)
    return _Role(None, is_matrix=True, is_expert=expert)
