"""Scales, rounding and packing of one weight, a band of its rows after the other.

Scales are computed by compressed-tensors itself, rounding and packing here, in blocks that stay in
a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# Integers of the same size.
_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

# Elements worked on at once. Scratch takes at most 10 bytes for each (a float64 copy and an
# int16): 20 MiB, 4 for bfloat16. Measured: larger blocks are not faster.
_BLOCK_ELEMENTS = 1 << 21

# By dtype: what is added to round to whole numbers, see _Scratch.pack_nibbles, and the sum's bits.
# Even, so that halves go where they should; and 17 * 68 + 4 and 17 * 98 + 6 are 8 * 17 in a byte,
# what the format adds to two numbers.
_TO_WHOLE = {
    torch.bfloat16: (128 + 68, 0x4300 + 68),
    torch.float16: (1024 + 98, 0x6400 + 98),
}

# Of a weight that is in memory scales are computed for so many blocks at once: it is a dozen calls
# of torch for few numbers.
_BLOCKS_TOGETHER = 8

Calculate = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, Any]]
"""compressed-tensors' ``calculate_qparams``: least and largest values, arguments -> scales."""


class WeightQuantizer:
    """Quantizes one weight; begun by ``Scheme.begin``, which says what the bits are.

    Beside what it gives it uses 20 MiB at most, however large the weight. Not thread-safe.

    Attributes:
        scales: of the rows that were added, in the weight's dtype: (rows, groups).
        spoiled_count: how many of them are not finite.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        bits: int,
        group_size: int | None,
        calculate: Calculate,
        arguments: Any,
    ) -> None:
        """Begin.

        Args:
            shape: the weight's, (rows, columns).
            dtype: the weight's.
            device: where its bands will be.
            bits: of an integer, 4 or 8; 0 for float8.
            group_size: how many columns share a scale; ``None``: all.
            calculate: computes scales.
            arguments: for it.
        """
        rows, self._columns = shape
        assert shape[1] * bits % 32 == 0  # no scheme has groups that end within a word
        self._group = group_size or self._columns
        self._unit = group_size or 1
        self._bits = bits
        self._calculate, self._arguments = calculate, arguments
        self.scales = torch.empty((rows, self._columns // self._group), dtype=dtype, device=device)
        self.spoiled_count = 0
        self._done = 0
        block_rows, block_columns = self._block_shape()
        self._scratch = _Scratch(min(rows, block_rows) * block_columns, dtype, device, bits)
        self._own = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def rows_together(self) -> int:
        """Rows of a band that are best added at once; any number can be."""
        return self._block_shape()[0] * _BLOCKS_TOGETHER

    @torch.no_grad()
    def add(self, band: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Quantize the next rows.

        Args:
            band: (rows, columns), of any strides; it is only read.
            out: where to: contiguous rows of what ``Scheme.outputs`` names first. ``None``: into
                memory of this object's own.

        Returns:
            ``out``; without one a tensor like it, valid until the next call.
        """
        if out is None:
            out = self._rows_of_our_own(len(band))
        target = out
        if self._bits:  # as bytes, lowest first, a row of words is the row of packed integers
            target = out.view(torch.int8)
        scales = self.scales[self._done : self._done + len(band)]
        self._done += len(band)
        largest = torch.zeros_like(scales)
        for at, _, parts, groups in self._blocks(band):
            self._scratch.enlarge(largest[at, groups], parts)
        found, _ = self._calculate(-largest, largest, self._arguments)
        scales.copy_(found)
        spoiled = _count_not_finite(largest)
        self.spoiled_count += spoiled
        for at, left, parts, groups in self._blocks(band):
            ratios = self._scratch.divide(parts, scales[at, groups].unsqueeze(-1))
            if spoiled and self._bits:
                ratios.nan_to_num_(0)  # no whole number; times its scale it is NaN again
            self._store(ratios, target[at], left)
        return out

    def _rows_of_our_own(self, rows: int) -> torch.Tensor:
        nbytes = rows * self._columns * (self._bits or 8) // 8
        if len(self._own) < nbytes:
            self._own = self._own.new_empty(nbytes)
        dtype = torch.int32 if self._bits else torch.float8_e4m3fn
        return self._own[:nbytes].view(dtype).view(rows, -1)

    def _blocks(self, band: torch.Tensor) -> Iterator[tuple[slice, int, torch.Tensor, slice]]:
        """Cut a band: rows, first column, (rows, groups, columns of a group), groups."""
        block_rows, block_columns = self._block_shape()
        for top in range(0, len(band), block_rows):
            rows = slice(top, top + block_rows)
            for left in range(0, self._columns, block_columns):
                part = band[rows, left : left + block_columns]
                parts = part.reshape(len(part), -1, min(self._group, part.shape[1]))
                first = left // self._group
                yield rows, left, parts, slice(first, first + parts.shape[1])

    def _block_shape(self) -> tuple[int, int]:
        """Give a block's rows and columns; it cuts no group but a row too long for one block."""
        unit = self._unit
        block_columns = min(self._columns, max(unit, _BLOCK_ELEMENTS // unit * unit))
        return max(1, _BLOCK_ELEMENTS // self._columns), block_columns

    def _store(self, ratios: torch.Tensor, target: torch.Tensor, left: int) -> None:
        """Round ``ratios`` (overwritten) into ``target``, from the weight's column ``left``."""
        ratios = ratios.flatten(1)
        width = ratios.shape[1]
        if not self._bits:
            limit = torch.finfo(torch.float8_e4m3fn).max
            # compressed-tensors adds a zero point of 0, which makes 0.0 of -0.0.
            target[:, left : left + width].copy_(ratios.add_(0.0).clamp_(-limit, limit))
        elif self._bits == 4:
            packed = self._scratch.pack_nibbles(ratios)
            target[:, left // 2 : (left + width) // 2].copy_(packed)
        else:
            # The format adds half the range: the same as flipping the sign bit.
            ratios.clamp_(-128, 127).round_()
            target[:, left : left + width].copy_(ratios).bitwise_xor_(-128)


def _count_not_finite(magnitudes: torch.Tensor) -> int:
    """Count NaNs and infinities among numbers none of which is below zero.

    Their bits as integers are ordered as they are, and the largest of integers is found at once.
    """
    infinity = torch.tensor(torch.inf, dtype=magnitudes.dtype)
    as_integers = magnitudes.view(_INTEGERS[magnitudes.dtype])
    least = int(infinity.view(as_integers.dtype))
    if not magnitudes.numel() or int(as_integers.amax()) < least:
        return 0
    return int((as_integers >= least).sum())


class _Scratch:
    """Memory that is used again for each block."""

    def __init__(
        self, elements: int, dtype: torch.dtype, device: torch.device | str, bits: int
    ) -> None:
        self._ratios = torch.empty(elements, dtype=dtype, device=device)
        narrowed = elements if bits == 4 and dtype not in _TO_WHOLE else 0
        self._narrowed = torch.empty(narrowed, dtype=torch.int16, device=device)

    def enlarge(self, largest: torch.Tensor, parts: torch.Tensor) -> None:
        """Raise each of ``largest``, none below zero, to the largest magnitude of its part.

        Of floats without their sign bit those are the larger whose bits, as an integer, are; NaN
        is the largest. torch finds the largest of integers ten times as fast (measured).
        """
        bits = _INTEGERS[parts.dtype]
        magnitudes = self._ratios[: parts.numel()].view(parts.shape).view(bits)
        torch.bitwise_and(parts.view(bits), torch.iinfo(bits).max, out=magnitudes)
        seen = largest.view(bits)
        torch.maximum(seen, magnitudes.amax(-1), out=seen)

    def divide(self, part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``part / scale``, contiguous, valid until the next call."""
        return torch.div(part, scale, out=self._ratios[: part.numel()].view(part.shape))

    def pack_nibbles(self, values: torch.Tensor) -> torch.Tensor:
        """Round to whole numbers from -8 to 7, and pack those, plus 8, two to a byte.

        The first of two lies lowest: little-endian, as every file that this package maps.

        Args:
            values: (rows, columns), overwritten; those of 16 bits from -60 to 59.

        Returns:
            (rows, columns / 2) int32 whose lowest bytes are what was packed; valid until the
            next call.
        """
        # bfloat16 has the whole numbers from 128 to 255 and none between: a sum rounds as round
        # does, half to even, and its bits count on from those of 128, which are 0x4300. So does
        # float16 from 1024, 0x6400.
        if values.dtype in _TO_WHOLE:
            number, bits = _TO_WHOLE[values.dtype]
            shifted = values.add_(number).view(torch.int16).clamp_(bits - 8, bits + 7)
        else:
            whole = values.clamp_(-8, 7).round_()
            _, bits = _TO_WHOLE[torch.bfloat16]
            shifted = self._narrowed[: whole.numel()].view(whole.shape).copy_(whole).add_(bits)
        # The third byte of a product is the first number's lowest byte, 16 times the second's,
        # and the first's highest four bits: 4, or 6 of a float16.
        return shifted.view(torch.int32).mul_((1 << 16) + (1 << 4)).bitwise_right_shift_(16)
