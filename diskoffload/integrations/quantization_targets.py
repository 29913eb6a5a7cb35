"""Which stored tensors of a checkpoint are weight matrices to quantize, and why the others not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diskoffload.errors import InvalidInputError
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
            regular expression that a name is searched for.

    Raises:
        InvalidInputError: a pattern that cannot be read.
        CheckpointError: the model's class is unknown.
    """
    patterns = [_compiled(one) for one in ignore]
    model = build_meta_model(folder)
    users = inverse_pieces(tensor_recipes(model, stored).recipes)
    weights: dict[str, None] = {}
    left: dict[str, str] = {}
    ignored: list[str] = []
    for name, spec in stored.items():
        uses = users.get(name, [])
        reason = _why_no_matrix(model, uses)
        if reason is None:
            owners = {name.rpartition(".")[0], *(use.rpartition(".")[0] for use, _ in uses)}
            reason = scheme.obstacle(name, spec.shape, spec.dtype)
            if any(pattern(owner) for pattern in patterns for owner in owners):
                reason = "it is on the ignore list"
            if reason is not None:
                ignored += sorted(owners)
        if reason is None:
            weights[name] = None
        else:
            left[name] = reason
    return Targets(weights, left, tuple(dict.fromkeys(ignored)))


def _compiled(entry: str):  # type: ignore[no-untyped-def]
    if not entry.startswith(_PATTERN):
        return lambda owner: owner == entry or owner.endswith(f".{entry}")
    try:
        return re.compile(entry.removeprefix(_PATTERN)).search
    except re.error as error:
        raise InvalidInputError(f"the ignore pattern {entry!r} cannot be read: {error}") from error


def _why_no_matrix(model: torch.nn.Module, uses: Sequence[tuple[str, Piece]]) -> str | None:
    if not uses:
        return "no tensor of the model is made of it"
    for name, _ in uses:
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        tensor = getattr(owner, key)
        if isinstance(owner, torch.nn.Linear) and key == "weight":
            continue
        if isinstance(owner, torch.nn.Linear):
            return "it is the bias of a linear layer"
        if tensor.ndim == 3 and "expert" in owner_name.lower():
            continue
        return f"it is the {key} of a module that is no linear layer ({type(owner).__name__})"
    return None
