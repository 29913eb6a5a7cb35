"""A tensor's bytes packed by a few threads, if that pays."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from diskoffload.store.codec import WritingCodec
from diskoffload.store.parallel import share
from diskoffload.store.workspace import Workspace
from diskoffload.system.memory import empty, tensor_bytes

# Compression that saves less than a tenth costs more than it gives, and hinders mapping.
_WORTH_PACKING = 0.9
# A sample may be a little worse than the whole.
_SAMPLE_WORTH_PACKING = 0.92
_SAMPLES, _SAMPLE_BYTES = 8, 32 << 10
_SAMPLED_FROM_BYTES = 4 * _SAMPLES * _SAMPLE_BYTES


@dataclass
class Packed:
    """A value's packed chunks, and xxh3-128 of exactly the bytes that are in them.

    The chunks are read-only and share one memory, which goes with the last of them.
    """

    chunks: list[memoryview]
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

    Raises:
        StorageError: the system has no memory for it.
    """
    if not _seems_to_pay(data, element_bytes, codec):
        return None
    count = -(-len(data) // codec.chunk_bytes)
    chunks = [memoryview(b"")] * count
    digest = xxhash.xxh3_128()
    # What needs more does not pay.
    room = Room(int(len(data) * _WORTH_PACKING))
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
    return None if room.is_exceeded else Packed(chunks, digest.digest())


class Room:
    """Memory that chunks are put into one after the other, as they come. Thread-safe.

    Taken at once, from the system: bytes objects made in threads cost as much as the packing,
    and the C library keeps what they leave.
    """

    def __init__(self, nbytes: int) -> None:
        """Take memory; what is never touched of it costs nothing.

        Raises:
            StorageError: the system has none.
        """
        self.is_exceeded = False
        self._bytes = np.frombuffer(tensor_bytes(empty(torch.uint8, (nbytes,))), np.uint8)
        self._used_bytes = 0
        self._lock = threading.Lock()

    def put(self, parts: Sequence[memoryview]) -> memoryview:
        """Copy a chunk's parts; give them together, or nothing if there is not the room."""
        nbytes = sum(map(len, parts))
        with self._lock:
            start = self._used_bytes
            if start + nbytes > len(self._bytes):
                self.is_exceeded = True
                return memoryview(b"")
            self._used_bytes += nbytes
        place = start
        for part in parts:
            np.copyto(self._bytes[place : place + len(part)], np.frombuffer(part, np.uint8))
            place += len(part)
        return self._bytes[start:place].data.toreadonly()


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
