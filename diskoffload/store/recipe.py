"""How one tensor is put together from stored ones: rename, stack, concatenate, transpose.

A model's tensors need not be the checkpoint's. transformers fuses a layer's experts into
one 3-D parameter, for example. A :class:`Recipe` says which region of the model's tensor
each stored tensor fills, so that it can be read piece by piece straight into its buffer,
and, read backwards, gives the stored tensors again at save.
"""

from __future__ import annotations

from typing import NamedTuple

Region = tuple[slice | int, ...]
"""An index of basic slices and integers; ``()`` is the whole tensor."""


class Piece(NamedTuple):
    """One stored tensor's part in a model's tensor.

    It states ``model_tensor[target] == source_tensor[region].permute(permutation)``.

    Attributes:
        source: name of the stored tensor.
        target: region of the model's tensor that this piece fills.
        region: region of the stored tensor that is taken.
        permutation: order of dimensions after taking ``region``; ``None`` keeps it.
    """

    source: str
    target: Region = ()
    region: Region = ()
    permutation: tuple[int, ...] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the stored tensor simply is the model's tensor."""
        return not self.target and not self.region and self.permutation is None


class Recipe(NamedTuple):
    """The pieces that tile one model tensor exactly, each element by one piece."""

    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, source: str) -> Recipe:
        """Make the recipe of a tensor that lies in a file as it is in the model."""
        return cls((Piece(source),))

    @property
    def is_whole(self) -> bool:
        """Whether the model's tensor is one stored tensor, unchanged."""
        return len(self.pieces) == 1 and self.pieces[0].is_whole
