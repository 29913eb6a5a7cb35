"""Run transformers' own conversion code on tensors without data, and see what goes where.

transformers converts a checkpoint by running ordinary torch code on its tensors. Run on a
:class:`TracedTensor`, which has a shape, a dtype and no data, the same code leaves behind a
list of tiles: which elements of which stored tensor stand where. So any conversion that only
moves elements becomes a recipe, whatever the class that performs it; one that computes raises
:class:`UntraceableError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from diskoffload.integrations.transformers_tiles import (
    Axis,
    Run,
    Tile,
    UntraceableError,
    check_count,
    reshaped,
)
from diskoffload.store.recipe import Recipe


class TracedTensor(torch.Tensor):
    """A tensor without data that knows which stored elements it would hold.

    Its shape and dtype are real, its device is "meta", and views of it are always reported as
    contiguous. Operations that move elements give traced tensors again; all others raise
    :class:`UntraceableError`. It owns no memory and may be shared between threads.
    """

    tiles: tuple[Tile, ...]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, tiles: Iterable[Tile]
    ) -> TracedTensor:
        """Make a tensor of ``shape`` and ``dtype`` that ``tiles`` cover."""
        made: TracedTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("meta")
        )
        made.tiles = tuple(tiles)
        return made

    @classmethod
    def stored(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> TracedTensor:
        """Make the stand-in of the stored tensor ``name``.

        Raises:
            UntraceableError: if it has no elements.
        """
        if 0 in shape:
            raise UntraceableError(
                f"Stored tensor {name!r} of shape {tuple(shape)} has no elements to trace; it "
                "must be converted by transformers itself."
            )
        return cls(shape, dtype, (Tile.whole(name, tuple(shape)),))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TracedTensor(shape={tuple(self.shape)}, tiles={len(self.tiles)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry the tiles through ``func``, or raise :class:`UntraceableError`."""
        handler = _HANDLERS.get(func._schema.name.removeprefix("aten::"))
        if handler is None:
            raise UntraceableError(
                f"Tracing a conversion, {func} was called, which does more than move elements; "
                "it must be converted by transformers itself."
            )
        return handler(*args, **(kwargs or {}))

    def recipe(self) -> Recipe:
        """State the tensor as a recipe over stored tensors.

        Raises:
            UntraceableError: if the tiles do not hold each element exactly once.
        """
        check_count(self.tiles)
        if sum(tile.numel for tile in self.tiles) != self.numel():
            raise UntraceableError(
                f"Tracing a conversion to shape {tuple(self.shape)}, elements were repeated or "
                "left out; it must be converted by transformers itself."
            )
        return Recipe(tuple(tile.piece(self.shape) for tile in self.tiles))


def _view(tensor: TracedTensor, shape: Sequence[int], *_strides: Any) -> TracedTensor:
    known = math.prod(size for size in shape if size != -1)
    sizes = [tensor.numel() // known if size == -1 else size for size in shape]
    tiles = reshaped(list(tensor.tiles), list(tensor.shape), sizes)
    return TracedTensor(sizes, tensor.dtype, tiles)


def _squeeze(tensor: TracedTensor, dims: int | Sequence[int] | None = None) -> TracedTensor:
    if dims is None:
        dims = range(tensor.ndim)
    chosen = {dim % tensor.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return _view(tensor, [n for d, n in enumerate(tensor.shape) if n != 1 or d not in chosen])


def _unsqueeze(tensor: TracedTensor, dim: int) -> TracedTensor:
    shape = list(tensor.shape)
    shape.insert(dim % (tensor.ndim + 1), 1)
    return _view(tensor, shape)


def _permute(tensor: TracedTensor, order: Sequence[int]) -> TracedTensor:
    order = [dim % tensor.ndim for dim in order]
    tiles = [replace(t, axes=tuple(t.axes[dim] for dim in order)) for t in tensor.tiles]
    return TracedTensor([tensor.shape[dim] for dim in order], tensor.dtype, tiles)


def _transpose(tensor: TracedTensor, dim0: int = 0, dim1: int = 1) -> TracedTensor:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _slice(
    tensor: TracedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> TracedTensor:
    dim, size = dim % tensor.ndim, tensor.shape[dim]
    first, stop, _ = slice(start, end).indices(size)
    if step != 1:
        raise UntraceableError(
            f"Tracing a conversion, a slice of step {step} was taken; it must be converted by "
            "transformers itself."
        )
    shape = [*tensor.shape[:dim], max(0, stop - first), *tensor.shape[dim + 1 :]]
    tiles = [part for tile in tensor.tiles for part in tile.cropped(dim, first, stop - first)]
    return TracedTensor(shape, tensor.dtype, tiles)


def _select(tensor: TracedTensor, dim: int, index: int) -> TracedTensor:
    dim, start = dim % tensor.ndim, index % tensor.shape[dim]
    return _squeeze(_slice(tensor, dim, start, start + 1), dim)


def _unbind(tensor: TracedTensor, dim: int = 0) -> list[TracedTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: TracedTensor, sizes: int | Sequence[int], dim: int = 0) -> list[TracedTensor]:
    if isinstance(sizes, int):
        starts = range(0, tensor.shape[dim], sizes)
        return [_slice(tensor, dim, start, start + sizes) for start in starts]
    parts, start = [], 0
    for size in sizes:
        parts.append(_slice(tensor, dim, start, start + size))
        start += size
    return parts


def _cat(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    shape, dtype = list(tensors[0].shape), tensors[0].dtype
    dim %= len(shape)
    tiles: list[Tile] = []
    offset = 0
    for tensor in tensors:
        size = tensor.shape[dim]
        _check_shape(tensor, [*shape[:dim], size, *shape[dim + 1 :]])
        tiles.extend(tile.moved(dim, offset) for tile in tensor.tiles)
        offset += size
    shape[dim] = offset
    return TracedTensor(shape, dtype, tiles)


def _stack(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    shape, dtype = list(tensors[0].shape), tensors[0].dtype
    dim %= len(shape) + 1
    tiles: list[Tile] = []
    for position, tensor in enumerate(tensors):
        _check_shape(tensor, shape)
        layer = Axis(Run(position, 1), None)
        tiles.extend(tile.with_axes(dim, 0, layer) for tile in tensor.tiles)
    return TracedTensor([*shape[:dim], len(tensors), *shape[dim:]], dtype, tiles)


def _check_shape(tensor: TracedTensor, wanted: Sequence[int]) -> None:
    """Raise :class:`UntraceableError` if a tensor cannot be joined to others."""
    if list(tensor.shape) != list(wanted):
        raise UntraceableError(
            f"Joining stored tensors, {tensor.tiles[0].source!r} was found to give shape "
            f"{tuple(tensor.shape)} where {tuple(wanted)} was needed; compare the checkpoint "
            "with its configuration."
        )


def _same(tensor: TracedTensor, *, memory_format: Any = None) -> TracedTensor:
    return TracedTensor(tensor.shape, tensor.dtype, tensor.tiles)


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach"), _same),
    **dict.fromkeys(("_reshape_alias", "_unsafe_view", "reshape", "view"), _view),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "cat": _cat,
    "permute": _permute,
    "select": _select,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "t": _transpose,
    "transpose": _transpose,
    "unbind": _unbind,
    "unsqueeze": _unsqueeze,
}
