"""How a stored tensor comes into a buffer piece by piece, each by itself and in any order."""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import Protocol

import xxhash

from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import ALIGNMENT_BYTES
from diskoffload.store.shard import buffer_bytes
from diskoffload.store.stored import ShardTensor
from diskoffload.store.workspace import Workspace
from diskoffload.system.files import BLOCK_BYTES
from diskoffload.system.memory import Memory, anonymous

# About so much: a tensor is cut into equal parts, for a small rest would be a read of its own. All
# readers are to be at one tensor, mostly: it is there the sooner (of 16 MiB a tenth, measured).
PIECE_BYTES = 4 << 20
_MOST_SHARE = 1.25
# Of packed bytes: what is decoded from them is larger, and to be decoded while others are read.
_PACKED_PIECE_BYTES = 4 << 20

Streamable = ShardTensor | EncodedTensor
"""What can be read past the page cache: a tensor whose bytes are the value's, or packed ones."""


class Hand:
    """What one thread works with: memory for packed bytes, tools to decode them."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._staging: Memory | None = None

    def staging(self, nbytes: int) -> Memory:
        """Give at least so many bytes, from a block's beginning; the same at the next call."""
        if self._staging is None or self._staging.nbytes < nbytes:
            self._staging = None  # before there are two
            self._staging = anonymous(nbytes)
        return self._staging


class Pieces(Protocol):
    """The pieces of one tensor. Thread-safe.

    Attributes:
        room_bytes: how large the buffer must be.
        ranges: of each piece, where it begins and ends, by an account of its own.
    """

    room_bytes: int
    ranges: list[tuple[int, int]]

    def read(self, start: int, stop: int, buffer: Memory, hand: Hand) -> None:
        """Bring one piece to its place in the buffer."""

    def finish(self, buffer: Memory, *, digests: bool, aligns: bool) -> tuple[int, bytes]:
        """Check all of it; give where in the buffer the value lies, and its digest.

        Without ``digests`` none is made, and empty given, where none is compared either. Without
        ``aligns`` the value lies at any address that its dtype can have.
        """


class PlainPieces:
    """Bytes that are the value's."""

    def __init__(self, stored: ShardTensor) -> None:
        self._stored = stored
        spec = stored.spec
        self.room_bytes = buffer_bytes(spec)
        begin = spec.offset % BLOCK_BYTES
        count = max(1, ceil(spec.nbytes / (PIECE_BYTES * _MOST_SHARE)))
        step_bytes = max(1, -(-(begin + spec.nbytes) // count // BLOCK_BYTES)) * BLOCK_BYTES
        edges = [0, *range(step_bytes - begin, spec.nbytes, step_bytes), spec.nbytes]
        self.ranges = list(pairwise(edges))

    def read(self, start: int, stop: int, buffer: Memory, hand: Hand) -> None:
        """Read straight into the buffer."""
        self._stored.shard.read_past_cache(self._stored.spec, start, stop, buffer)

    def finish(self, buffer: Memory, *, digests: bool, aligns: bool) -> tuple[int, bytes]:
        """Align the value, whatever its file does; compare it with its checksum."""
        stored, spec = self._stored, self._stored.spec
        begin = spec.offset % BLOCK_BYTES
        place = begin - begin % (ALIGNMENT_BYTES if aligns else spec.dtype.itemsize)
        if begin != place:  # sums of misaligned tensors may differ in their last bits
            buffer.move(begin, place, spec.nbytes)
        if not digests and stored.digest is None:
            return place, b""
        digest = xxhash.xxh3_128_digest(buffer.view(place, spec.nbytes))
        stored.checking().compare(digest.hex())
        return place, digest


class PackedPieces:
    """Some chunks each, which are decoded to where they belong; each has a checksum."""

    def __init__(self, stored: EncodedTensor) -> None:
        self._stored = stored
        self.room_bytes = -(-stored.nbytes // BLOCK_BYTES) * BLOCK_BYTES
        edges, taken_bytes = [0], 0
        for number, packed_bytes in enumerate(stored.chunks):
            if taken_bytes and taken_bytes + packed_bytes > _PACKED_PIECE_BYTES:
                edges.append(number)
                taken_bytes = 0
            taken_bytes += packed_bytes
        self.ranges = list(pairwise([*edges, stored.chunk_count]))

    def read(self, start: int, stop: int, buffer: Memory, hand: Hand) -> None:
        """Read the packed bytes of some chunks, and decode them into the buffer."""
        stored = self._stored
        begin = stored.chunk(start).offset
        spec = stored.spec._replace(offset=begin, nbytes=sum(stored.chunks[start:stop]))
        staging = hand.staging(buffer_bytes(spec))
        stored.shard.read_past_cache(spec, 0, spec.nbytes, staging)
        packed = staging.view(begin % BLOCK_BYTES, spec.nbytes)
        for number in range(start, stop):
            chunk = stored.chunk(number)
            at = chunk.offset - begin
            target = buffer.view(chunk.start, chunk.nbytes)
            stored.unpack_chunk(
                number, packed[at : at + chunk.packed_bytes], target, hand.workspace
            )

    def finish(self, buffer: Memory, *, digests: bool, aligns: bool) -> tuple[int, bytes]:
        """Digest the value, if that is to tell later whether it was edited."""
        return 0, xxhash.xxh3_128_digest(buffer.view(0, self._stored.nbytes)) if digests else b""


def pieces_of(stored: Streamable) -> Pieces:
    """Take a tensor apart."""
    return PlainPieces(stored) if isinstance(stored, ShardTensor) else PackedPieces(stored)
