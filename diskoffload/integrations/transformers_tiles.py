"""Boxes of stored elements, and where they go when a tensor is cut, moved or reshaped.

A :class:`Tile` says which box of one stored tensor fills which box of another tensor. Cutting,
joining and transposing move its borders; a reshape may break it into strips. In the end each
tile is one piece of a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from diskoffload.errors import OffloadError
from diskoffload.store.recipe import Piece, Region

_MOST_TILES = 16_384
"""Beyond this a reading by pieces costs more than a converted copy (our estimate: a gather of
16,384 experts fits, a flattened 3-D convolution of a thousand channels does not)."""


class UntraceableError(OffloadError, ValueError):
    """A conversion computes, or scatters elements too finely for a recipe.

    Not a :class:`TypeError`, which torch's operators swallow.
    """


@dataclass(frozen=True)
class Run:
    """``count`` evenly spaced positions along one dimension, from ``start`` by ``step``."""

    start: int
    count: int
    step: int = 1

    def sub(self, first: int, count: int, step: int = 1) -> Run:
        """Take ``count`` of these positions, from the one numbered ``first``."""
        return Run(self.start + first * self.step, count, self.step * step)

    def index(self, size: int) -> slice | int:
        """Give the basic index of these positions in a dimension of ``size``."""
        if self.count == 1 and size != 1:
            return self.start
        if (self.start, self.count, self.step) == (0, size, 1):
            return slice(None)
        stop = self.start + (self.count - 1) * self.step + 1
        return slice(self.start, stop, None if self.step == 1 else self.step)


@dataclass(frozen=True)
class Axis:
    """A dimension of the traced tensor within one tile.

    Attributes:
        run: positions that the tile covers.
        source_dim: dimension of the stored tensor that runs along it; ``None`` if the tile
            is one position thick here.
    """

    run: Run
    source_dim: int | None


@dataclass(frozen=True)
class Tile:
    """A box of the traced tensor, filled by an equally large box of one stored tensor."""

    source: str
    source_shape: tuple[int, ...]
    region: tuple[Run, ...]
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, source: str, shape: tuple[int, ...]) -> Tile:
        """Make the tile of a stored tensor as it is."""
        runs = tuple(Run(0, size) for size in shape)
        axes = tuple(Axis(run, None if run.count == 1 else dim) for dim, run in enumerate(runs))
        return cls(source, tuple(shape), runs, axes)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(axis.run.count for axis in self.axes)

    def with_axes(self, dim: int, count: int, *axes: Axis) -> Tile:
        """Put ``axes`` in the place of the ``count`` axes from ``dim``."""
        changed = self.axes[:dim] + axes + self.axes[dim + count :]
        return Tile(self.source, self.source_shape, self.region, changed)

    def part(self, dim: int, first: int, count: int, step: int = 1) -> Tile:
        """Keep some of the positions along ``dim``, where they stand."""
        axis = self.axes[dim]
        source_dim, region = axis.source_dim, list(self.region)
        if source_dim is not None:
            region[source_dim] = region[source_dim].sub(first, count, step)
        kept = Axis(axis.run.sub(first, count, step), None if count == 1 else source_dim)
        return replace(self.with_axes(dim, 1, kept), region=tuple(region))

    def moved(self, dim: int, offset: int) -> Tile:
        """Shift the tile along ``dim``."""
        axis = self.axes[dim]
        run = Run(axis.run.start + offset, axis.run.count, axis.run.step)
        return self.with_axes(dim, 1, Axis(run, axis.source_dim))

    def cropped(self, dim: int, start: int, length: int) -> Iterable[Tile]:
        """Give what lies within ``[start, start + length)`` along ``dim``, counted from there."""
        run = self.axes[dim].run
        first = max(0, -((run.start - start) // run.step))
        last = min(run.count - 1, (start + length - 1 - run.start) // run.step)
        if first <= last:
            yield self.part(dim, first, last - first + 1).moved(dim, -start)

    def merged(self, dim: int, inner_size: int) -> Iterable[Tile]:
        """Flatten dimensions ``dim`` and ``dim + 1``, the latter of ``inner_size``."""
        outer, inner = self.axes[dim], self.axes[dim + 1]
        start = outer.run.start * inner_size + inner.run.start
        if outer.run.count == 1:
            run = Run(start, inner.run.count, inner.run.step)
            yield self.with_axes(dim, 2, Axis(run, inner.source_dim))
        elif inner.run.count == 1:
            run = Run(start, outer.run.count, outer.run.step * inner_size)
            yield self.with_axes(dim, 2, Axis(run, outer.source_dim))
        else:
            thin = dim if outer.run.count <= inner.run.count else dim + 1
            for position in range(self.axes[thin].run.count):
                yield from self.part(thin, position, 1).merged(dim, inner_size)

    def split(self, dim: int, inner_size: int) -> Iterable[Tile]:
        """Make two dimensions of ``dim``, the inner one of ``inner_size``."""
        axis = self.axes[dim]
        run, last = axis.run, axis.run.start + (axis.run.count - 1) * axis.run.step
        outer, inner = divmod(run.start, inner_size)
        rows = last // inner_size - outer + 1
        if rows == 1:
            point, line = Axis(Run(outer, 1), None), Run(inner, run.count, run.step)
            yield self.with_axes(dim, 1, point, replace(axis, run=line))
        elif run.step % inner_size == 0:
            column = Run(outer, run.count, run.step // inner_size)
            yield self.with_axes(dim, 1, replace(axis, run=column), Axis(Run(inner, 1), None))
        elif run.step == 1 and not inner and rows * inner_size == run.count and rows > inner_size:
            for position in range(inner_size):
                yield from self.part(dim, position, rows, inner_size).split(dim, inner_size)
        else:
            for row in range(outer, outer + rows):
                for tile in self.cropped(dim, row * inner_size, inner_size):
                    yield tile.with_axes(dim, 0, Axis(Run(row, 1), None))

    def piece(self, shape: Sequence[int]) -> Piece:
        """State the tile as a recipe's piece of a tensor of ``shape``."""
        target = tuple(a.run.index(size) for a, size in zip(self.axes, shape, strict=True))
        region = tuple(
            r.index(size) for r, size in zip(self.region, self.source_shape, strict=True)
        )
        whole = all(index == slice(None) for index in (*target, *region))
        kept = [dim for dim, run in enumerate(self.region) if run.count > 1]
        order = tuple(kept.index(a.source_dim) for a in self.axes if a.source_dim is not None)
        straight = order == tuple(range(len(order)))
        if whole and straight and tuple(shape) == self.source_shape:
            return Piece(self.source)
        # Here a dimension of size one is indexed away on both sides: it may exist on one only.
        target = tuple(0 if size == 1 else i for i, size in zip(target, shape, strict=True))
        region = tuple(
            0 if size == 1 else i for i, size in zip(region, self.source_shape, strict=True)
        )
        return Piece(self.source, _trimmed(target), _trimmed(region), None if straight else order)


def _trimmed(index: Region) -> Region:
    """Drop the trailing full slices, which a basic index implies."""
    while index and index[-1] == slice(None):
        index = index[:-1]
    return index


def reshaped(tiles: list[Tile], old: list[int], new: list[int]) -> list[Tile]:
    """Carry tiles from shape ``old`` to shape ``new``, element order unchanged."""
    # Dimensions of size one come and go freely; the others change in groups of equal product.
    for dim in reversed(range(len(old))):
        if old[dim] == 1:
            tiles = [tile.with_axes(dim, 1) for tile in tiles]
    shape, goal = [n for n in old if n != 1], [n for n in new if n != 1]
    for dim, size in enumerate(goal):
        while shape[dim] % size:
            inner_size = shape[dim + 1]
            tiles = [part for tile in tiles for part in tile.merged(dim, inner_size)]
            shape[dim : dim + 2] = [shape[dim] * inner_size]
            check_count(tiles)
        if shape[dim] != size:
            inner_size = shape[dim] // size
            tiles = [part for tile in tiles for part in tile.split(dim, inner_size)]
            shape[dim : dim + 1] = [size, inner_size]
            check_count(tiles)
    for dim, size in enumerate(new):
        if size == 1:
            tiles = [tile.with_axes(dim, 0, Axis(Run(0, 1), None)) for tile in tiles]
    return tiles


def check_count(tiles: Sequence[Tile]) -> None:
    """Raise :class:`UntraceableError` if a recipe of ``tiles`` would be absurdly long."""
    if len(tiles) > _MOST_TILES:
        raise UntraceableError(
            f"Tracing a conversion of {tiles[0].source!r}, its elements fell into more than "
            f"{_MOST_TILES} strips; it must be converted by transformers itself."
        )
