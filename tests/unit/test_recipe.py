"""Recipes say one thing in both directions."""

from __future__ import annotations

import pytest
import torch

from diskoffload.store.recipe import Piece, Recipe


def test_a_whole_recipe_is_one_unchanged_tensor() -> None:
    recipe = Recipe.whole("a.weight")
    assert recipe.pieces == (Piece("a.weight"),)
    assert recipe.is_whole
    assert recipe.pieces[0].is_whole


@pytest.mark.parametrize(
    "piece",
    [
        Piece("a", target=(0,)),
        Piece("a", region=(slice(0, 2),)),
        Piece("a", permutation=(1, 0)),
        Piece("a", permutation=(0, 1)),
    ],
)
def test_a_piece_that_takes_or_fills_a_part_is_not_whole(piece: Piece) -> None:
    assert not piece.is_whole
    assert not Recipe((piece,)).is_whole


def test_several_pieces_are_not_whole() -> None:
    assert not Recipe((Piece("a"), Piece("b"))).is_whole
    assert not Recipe(()).is_whole


def test_recipes_are_values() -> None:
    assert Recipe((Piece("a", (0,)),)) == Recipe((Piece("a", (0,)),))
    with pytest.raises(AttributeError):
        Piece("a").source = "b"  # type: ignore[misc]


def test_a_piece_states_what_its_docstring_says() -> None:
    source = torch.arange(24).reshape(2, 3, 4)
    model = torch.zeros(5, 4, 3, dtype=source.dtype)
    piece = Piece("s", target=(slice(1, 3),), region=(slice(None),), permutation=(0, 2, 1))
    assert piece.permutation is not None
    model[piece.target] = source[piece.region].permute(piece.permutation)
    assert model[1, 3, 2] == source[0, 2, 3]
    back = [piece.permutation.index(axis) for axis in range(3)]
    assert torch.equal(model[piece.target].permute(back), source[piece.region])
