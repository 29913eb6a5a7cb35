"""A tensor's bytes packed by a few threads, if that pays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from diskoffload.store.codec import WritingCodec
from diskoffload.store.parallel import share
from diskoffload.store.workspace import Workspace

# Compression that saves less than a tenth costs more than it gives, and hinders mapping.
_WORTH_PACKING = 0.9
# A sample may be a little worse than the whole.
_SAMPLE_WORTH_PACKING = 0.92
_SAMPLES, _SAMPLE_BYTES = 8, 32 << 10
_SAMPLED_FROM_BYTES = 4 * _SAMPLES * _SAMPLE_BYTES


@dataclass
class Packed:
    """A value's packed chunks, and xxh3-128 of exactly the bytes that are in them."""

    chunks: list[bytes]
    digest: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(map(len, self.chunks))


def pack(data: memoryview, element_bytes: int, codec: WritingCodec) -> Packed | None:
    """Pack a value, or answer ``None`` if that saves less than a tenth.

    A few samples tell that of most values before anything else is done. Beside the packed
    bytes it takes some MiB for each thread. ``data`` may change meanwhile: what is packed is
    what the digest is of.
    """
    if not _seems_to_pay(data, element_bytes, codec):
        return None
    count = -(-len(data) // codec.chunk_bytes)
    chunks = [b""] * count
    digest = xxhash.xxh3_128()
    in_order = threading.Lock()

    def work(numbers: Iterator[int]) -> None:
        workspace = Workspace()
        while True:
            with in_order:
                number = next(numbers, None)
                if number is None:
                    return
                start = number * codec.chunk_bytes
                source = data[start : start + codec.chunk_bytes]
                own = workspace.buffer("value", len(source)).data
                own[:] = source
                digest.update(own)
            chunks[number] = codec.pack_chunk(own, start, element_bytes, workspace)

    share(count, work)
    packed = Packed(chunks, digest.digest())
    return packed if packed.nbytes < len(data) * _WORTH_PACKING else None


def _seems_to_pay(data: memoryview, element_bytes: int, codec: WritingCodec) -> bool:
    if len(data) < _SAMPLED_FROM_BYTES:
        return True
    workspace = Workspace()
    step = (len(data) - _SAMPLE_BYTES) // (_SAMPLES - 1) // element_bytes * element_bytes
    packed_bytes = 0
    for start in range(0, _SAMPLES * step, step):
        sample = bytes(data[start : start + _SAMPLE_BYTES])
        packed_bytes += len(codec.pack_chunk(memoryview(sample), start, element_bytes, workspace))
    return packed_bytes < _SAMPLES * _SAMPLE_BYTES * _SAMPLE_WORTH_PACKING
