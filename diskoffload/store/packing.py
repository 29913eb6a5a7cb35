"""A tensor's bytes packed by a few threads, if that pays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from diskoffload.store.buffers import Buffers
from diskoffload.store.codec import WritingCodec
from diskoffload.store.parallel import share
from diskoffload.store.room import Room
from diskoffload.store.workspace import Workspace

# Compression that saves less than a tenth costs more than it gives, and hinders mapping.
_WORTH_PACKING = 0.9
# A sample may be a little worse than the whole.
_SAMPLE_WORTH_PACKING = 0.92
_SAMPLES, _SAMPLE_BYTES = 8, 32 << 10
# What may wait for the next value.
_MOST_SPARE_BYTES = 32 << 20
_SAMPLED_FROM_BYTES = 4 * _SAMPLES * _SAMPLE_BYTES


@dataclass
class Packed:
    """A value's packed chunks, and xxh3-128 of exactly the bytes that are in them.

    The chunks are read-only and alias the room's memory.
    """

    chunks: list[memoryview]
    digest: bytes
    _room: Room
    _spare: Buffers

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return sum(map(len, self.chunks))

    def release(self) -> None:
        """Let the memory be used for the next value; the chunks are gone from here.

        A chunk that somebody still has stays what it is. Without this call the memory goes
        back to the system with the last chunk.
        """
        self.chunks.clear()
        self._room.give_back()
        self._spare.shrink(_MOST_SPARE_BYTES)


def pack(
    data: memoryview, element_bytes: int, codec: WritingCodec, spare: Buffers | None = None
) -> Packed | None:
    """Pack a value, or answer ``None`` if that saves less than a tenth.

    A few samples tell that of most values before anything else is done. Beside the packed
    bytes it takes some MiB for each thread. ``data`` may change meanwhile: what is packed is
    what the digest is of.

    Args:
        data: the value's bytes.
        element_bytes: as ``element_bytes_of`` has it.
        codec: packs the chunks.
        spare: memory for what is packed, and where it goes at :meth:`Packed.release`.

    Raises:
        StorageError: the system has no memory for it.
    """
    if not _seems_to_pay(data, element_bytes, codec):
        return None
    count = -(-len(data) // codec.chunk_bytes)
    chunks = [memoryview(b"")] * count
    digest = xxhash.xxh3_128()
    # What needs more does not pay.
    spare = Buffers() if spare is None else spare
    room = Room(int(len(data) * _WORTH_PACKING), spare)
    in_order = threading.Lock()

    def work(numbers: Iterator[int]) -> None:
        workspace = Workspace()
        while not room.is_exceeded:
            with in_order:
                number = next(numbers, None)
                if number is None:
                    return
                start = number * codec.chunk_bytes
                source = data[start : start + codec.chunk_bytes]
                own = workspace.buffer("value", len(source))
                np.copyto(own, np.frombuffer(source, np.uint8))
                digest.update(own.data)
            chunks[number] = room.put(codec.pack_chunk(own.data, start, element_bytes, workspace))

    share(count, work)
    if room.is_exceeded:
        chunks.clear()
        room.give_back()
        return None
    return Packed(chunks, digest.digest(), room, spare)


def _seems_to_pay(data: memoryview, element_bytes: int, codec: WritingCodec) -> bool:
    if len(data) < _SAMPLED_FROM_BYTES:
        return True
    return _sampled_share(data, element_bytes, codec) < _SAMPLE_WORTH_PACKING


def estimated_share(data: memoryview, element_bytes: int, codec: WritingCodec) -> float:
    """Estimate, from a few samples, what share of its bytes a value will take; 1 if none pays."""
    if not data:
        return 1.0
    if len(data) < _SAMPLED_FROM_BYTES:
        packed = pack(data, element_bytes, codec)
        return 1.0 if packed is None else packed.nbytes / len(data)
    share = _sampled_share(data, element_bytes, codec)
    return share if share < _SAMPLE_WORTH_PACKING else 1.0


def _sampled_share(data: memoryview, element_bytes: int, codec: WritingCodec) -> float:
    workspace = Workspace()
    step = (len(data) - _SAMPLE_BYTES) // (_SAMPLES - 1) // element_bytes * element_bytes
    packed_bytes = 0
    for start in range(0, _SAMPLES * step, step):
        sample = bytes(data[start : start + _SAMPLE_BYTES])
        parts = codec.pack_chunk(memoryview(sample), start, element_bytes, workspace)
        packed_bytes += sum(map(len, parts))
    return packed_bytes / (_SAMPLES * _SAMPLE_BYTES)
