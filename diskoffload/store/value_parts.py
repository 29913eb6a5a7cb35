"""A stored tensor's value, a part in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash

from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import empty, tensor_bytes

# Enough chunks for every thread, little beside a layer.
PART_BYTES = 32 << 20


def value_parts(
    tensor: ShardTensor | EncodedTensor, digest: xxhash.xxh3_128
) -> Iterator[memoryview]:
    """Read a tensor's value in order; each part is valid until the next one.

    Args:
        tensor: packed or not.
        digest: takes the value's bytes.

    Raises:
        DamagedFileError: a packed chunk is not what was written.
        StorageError: the file cannot be read.
    """
    buffer = tensor_bytes(empty(torch.uint8, (min(PART_BYTES, tensor.nbytes),)))
    for start in range(0, tensor.nbytes, PART_BYTES):
        part = buffer[: tensor.nbytes - start]
        tensor.read_value(part, start)
        digest.update(part)
        yield part
    tensor.shard.drop_tensor_behind(tensor.spec)


def value_digest(tensor: ShardTensor | EncodedTensor) -> str:
    """Give xxh3-128 of a tensor's value, in hexadecimal; raises as :func:`value_parts`."""
    digest = xxhash.xxh3_128()
    for _ in value_parts(tensor, digest):
        pass
    return digest.hexdigest()
