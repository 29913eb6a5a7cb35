"""Convert a stored tensor to another dtype, a block in memory at a time.

Values that overflow are counted, block by block, and warned of. The store's ``CastTensor``
cannot tell, and it copies all of a tensor that cannot be mapped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from math import prod

import torch

from diskoffload.store.shard_writer import ShardWriter
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import empty, tensor_bytes

_log = logging.getLogger(__name__)

# Elements converted at once. A block and what it becomes take at most 12 bytes for each, and
# 19 where infinities of a float64 are counted: 38 MiB, less than the scratch that the plan
# counts for quantizing, which is taken only after they were given back.
_BLOCK_ELEMENTS = 1 << 21


def load_in_dtype(tensor: ShardTensor, dtype: torch.dtype) -> torch.Tensor:
    """Give a weight: mapped where its bytes are what is wanted, else in memory of its own.

    Raises:
        StorageError: a file cannot be read.
        DamagedFileError: the source was changed since it was opened.
    """
    if dtype == tensor.dtype:
        weight = tensor.mapped()
        return tensor.load() if weight is None else weight
    made = empty(dtype, tensor.shape)
    flat = made.view(-1)
    lost = 0
    for start, block in _blocks(tensor):
        lost += _convert(block, flat[start : start + len(block)])
    _warn_of_overflow(tensor, dtype, lost)
    return made


def copy_in_dtype(tensor: ShardTensor, dtype: torch.dtype, writer: ShardWriter, name: str) -> None:
    """Convert a tensor from its file to the one being written.

    Raises:
        StorageError: a file cannot be read or written.
        DamagedFileError: the source was changed since it was opened.
    """
    made = empty(dtype, (min(prod(tensor.shape), _BLOCK_ELEMENTS),))
    lost = 0
    for _, block in _blocks(tensor):
        part = made[: len(block)]
        lost += _convert(block, part)
        writer.write_part(name, tensor_bytes(part))
    _warn_of_overflow(tensor, dtype, lost)


def _blocks(tensor: ShardTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Read a tensor's elements in their order; a block is valid until the next one."""
    count, item_bytes = prod(tensor.shape), tensor.dtype.itemsize
    buffer = empty(tensor.dtype, (min(count, _BLOCK_ELEMENTS),))
    for start in range(0, count, _BLOCK_ELEMENTS):
        block = buffer[: count - start]
        tensor.shard.read_into(tensor.spec, tensor_bytes(block), start * item_bytes)
        yield start, block


def _convert(source: torch.Tensor, target: torch.Tensor) -> int:
    """Convert a block; count the values that were finite and are no more."""
    target.copy_(source)
    # Of the three dtypes only this one is so narrow that weights do overflow it.
    if target.dtype != torch.float16 or source.dtype.itemsize == 1:
        return 0
    if torch.stack(torch.aminmax(target)).isfinite().all():  # twenty times faster than counting
        return 0
    return int(target.isinf().sum()) - int(source.isinf().sum())


def _warn_of_overflow(tensor: ShardTensor, dtype: torch.dtype, count: int) -> None:
    if count:
        _log.warning(
            "%s: %d values are too large for %s and became infinite, as they would in "
            "transformers; bfloat16 has room for them",
            tensor.spec.name,
            count,
            str(dtype).removeprefix("torch."),
        )
