"""Carry out recipes with plain torch, forwards and backwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diskoffload.integrations.transformers_conversion import inverse_pieces
from diskoffload.store.recipe import Recipe


def execute(
    recipe: Recipe, stored: Mapping[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Build a model's tensor; fail unless every element is written exactly once."""
    result = torch.empty(shape, dtype=dtype)
    writes = torch.zeros(shape, dtype=torch.int32)
    for piece in recipe.pieces:
        values = stored[piece.source][piece.region]
        if piece.permutation is not None:
            values = values.permute(piece.permutation)
        assert result[piece.target].shape == values.shape, piece
        result[piece.target] = values.to(dtype)
        writes[piece.target] += 1
    assert bool((writes == 1).all()), recipe
    return result


def execute_inverse(
    recipes: Mapping[str, Recipe],
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Rebuild the stored tensors, whose shapes and dtypes alone are taken from ``stored``."""
    rebuilt = {}
    for source, pieces in inverse_pieces(recipes).items():
        result = torch.empty_like(stored[source])
        writes = torch.zeros(result.shape, dtype=torch.int32)
        for name, piece in pieces:
            values = tensors[name][piece.target]
            if piece.permutation is not None:
                order = sorted(range(len(piece.permutation)), key=piece.permutation.__getitem__)
                values = values.permute(order)
            result[piece.region] = values.to(result.dtype)
            writes[piece.region] += 1
        assert bool((writes == 1).all()), source
        rebuilt[source] = result
    return rebuilt
