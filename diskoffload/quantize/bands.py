"""How much of a tensor is in memory at once, and what quantizing takes of memory therefore."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from diskoffload.integrations.quantization import Scheme
from diskoffload.store.buffers import buffer_size_bytes
from diskoffload.store.pieces import pieces_of
from diskoffload.store.stored import ShardTensor

# So much of a tensor is read, and worked on, at a time. Smaller bands give a disk too little at
# once, and of larger ones fewer are on their way in the same memory (measured: 8 to 32 MiB are as
# fast). Not more elements, for they may be converted to a wider dtype.
_BAND_BYTES = 8 << 20
_BAND_ELEMENTS = 4 << 20
# What all bands in memory may take: the one that is worked on, and those read meanwhile.
_MOST_BYTES = 48 << 20
# What quantizing one band takes beside it (see WeightQuantizer), and what waits to be written.
_SCRATCH_BYTES = 56 << 20


def cut(tensor: ShardTensor, *, by_rows: bool) -> list[ShardTensor]:
    """Cut a tensor into bands: by its rows, or anywhere."""
    if not by_rows:
        tensor = tensor.flat()
    return tensor.bands(_band_rows(tensor.shape, tensor.dtype))


def _band_rows(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    columns = max(1, prod(shape[1:]))
    return max(1, min(_BAND_BYTES // dtype.itemsize, _BAND_ELEMENTS) // columns)


@dataclass(frozen=True)
class MemoryNeeded:
    """What quantizing takes of anonymous memory, beside the interpreter's.

    Attributes:
        fixed_bytes: whatever the bands may take.
        least_bands_bytes: what they must be given: for one that is worked on, and one that is
            read.
    """

    fixed_bytes: int
    least_bands_bytes: int

    def bands_bytes(self, max_bytes: int | None) -> int:
        """Tell what the bands take where all of it may take ``max_bytes``, if it fits at all."""
        left_bytes = _MOST_BYTES if max_bytes is None else max_bytes - self.fixed_bytes
        return max(self.least_bands_bytes, min(_MOST_BYTES, left_bytes))


def memory_needed(
    tensors: Iterable[tuple[ShardTensor, torch.dtype, bool]], scheme: Scheme
) -> MemoryNeeded:
    """Tell what quantizing takes of memory.

    Args:
        tensors: each with the dtype in which it is quantized or copied, and whether it is a
            weight to quantize.
        scheme: how.
    """
    beside_bytes = band_bytes = 0
    for tensor, dtype, is_weight in tensors:
        first = next(iter(cut(tensor, by_rows=is_weight)), None)
        if first is None:
            continue
        band_bytes = max(band_bytes, buffer_size_bytes(pieces_of(first).room_bytes))
        beside = 0 if dtype == tensor.dtype else prod(first.shape) * dtype.itemsize
        if is_weight:  # all but the first stay until the last band was written
            _, *others = scheme.outputs(tensor.spec.name, tensor.shape, dtype).values()
            beside += sum(prod(shape) * one.itemsize for one, shape in others)
        beside_bytes = max(beside_bytes, beside)
    return MemoryNeeded(_SCRATCH_BYTES + beside_bytes, 2 * band_bytes)
