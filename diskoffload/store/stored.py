"""Where one tensor's value comes from: a range of a file, or something made of ranges.

Everything above the store sees a :class:`Stored`: it has a dtype and a shape, can fill a
buffer, and, where the bytes in the file are the tensor's own, can be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NoReturn, Protocol

import torch

from diskoffload.errors import DamagedFileError
from diskoffload.store.digests import Checking, digests_of
from diskoffload.store.encoded import ENCODING_KEY, EncodedTensor, describes_encodings
from diskoffload.store.header import StoredSpec
from diskoffload.store.json_reader import JsonReader
from diskoffload.store.recipe import Piece
from diskoffload.store.shard import Shard
from diskoffload.system.memory import empty, tensor_bytes

# Of the JSON that describes one packed tensor: enough for the chunks of 130 GB.
_MAX_ENCODING_BYTES = 1 << 20


class Stored(Protocol):
    """A tensor's value at rest. Never changes; thread-safe.

    Attributes:
        dtype: element type of the value.
        shape: its shape.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the value."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files it is read from."""

    def mapped(self) -> torch.Tensor | None:
        """Give a tensor aliasing the file, or ``None`` where its bytes differ from the value."""

    def load(self) -> torch.Tensor:
        """Give the value in fresh memory of its own."""

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Give the rows ``start`` to ``stop - 1`` in fresh memory of their own.

        No more is read and decoded than must be. A checksum is of a whole tensor, or of a
        packed chunk: rows of one whose bytes are its value are not compared with it.

        Args:
            start: the first; ``0 <= start <= stop``.
            stop: the one after the last, at most the length of the first dimension, which
                the value must have.
        """

    def over(self, twins: Callable[[Shard], Shard]) -> Stored:
        """Give the same value read through other shard objects of the same files."""


class ShardTensor:
    """One tensor of one file, its bytes being its value."""

    def __init__(self, shard: Shard, spec: StoredSpec, digest: str | None = None) -> None:
        self.shard = shard
        self.spec = spec
        self.digest = digest
        self.dtype = spec.dtype
        self.shape = spec.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return self.spec.nbytes

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The one file."""
        return (self.shard,)

    def over(self, twins: Callable[[Shard], Shard]) -> ShardTensor:
        """Read the same range through another shard object."""
        return ShardTensor(twins(self.shard), self.spec, self.digest)

    def bands(self, rows: int) -> list[ShardTensor]:
        """Cut it into tensors of so many rows of its first dimension, the last of what is left.

        None of them has a checksum, for that is of all of it.
        """
        spec = self.spec
        row_bytes = prod(spec.shape[1:]) * spec.dtype.itemsize
        made = []
        for start in range(0, spec.shape[0], rows):
            shape = (min(rows, spec.shape[0] - start), *spec.shape[1:])
            nbytes, offset = shape[0] * row_bytes, spec.offset + start * row_bytes
            band = spec._replace(shape=shape, offset=offset, nbytes=nbytes)
            made.append(ShardTensor(self.shard, band))
        return made

    def flat(self) -> ShardTensor:
        """Take it as a tensor of one dimension, which has the same elements in their order."""
        flat = self.spec._replace(shape=(prod(self.shape),))
        return ShardTensor(self.shard, flat, self.digest)

    def mapped(self) -> torch.Tensor | None:
        """Alias the file, unless the tensor lies at an address its dtype cannot have."""
        self.shard.check_first_read(self.spec, self.digest)
        if self.spec.offset % self.dtype.itemsize:
            return None
        return self.shard.mapped(self.spec)

    def load(self) -> torch.Tensor:
        """Read the bytes into fresh memory."""
        tensor = empty(self.dtype, self.shape)
        self.shard.read_into(self.spec, tensor_bytes(tensor))
        check = self.checking()
        check.add(tensor_bytes(tensor))
        check.finish()
        return tensor

    def checking(self) -> Checking:
        """Begin to compare its bytes with its checksum, if it has one."""
        return Checking(str(self.shard.path), self.spec.name, self.spec.offset, self.digest)

    def read_value(self, target: memoryview, start: int) -> None:
        """Read the value's bytes from ``start`` on; they are not compared with a checksum.

        Raises:
            DamagedFileError: the file was changed since it was opened.
            StorageError: it cannot be read.
        """
        self.shard.read_into(self.spec, target, start)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Read only the bytes of these rows; they cannot be compared with the checksum."""
        self.shard.check_first_read(self.spec, self.digest)
        tensor = empty(self.dtype, (stop - start, *self.shape[1:]))
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        self.shard.read_into(self.spec, tensor_bytes(tensor), start * row_bytes)
        return tensor


class AssembledTensor:
    """A tensor put together from pieces of stored ones, in their dtype."""

    def __init__(
        self,
        pieces: Sequence[tuple[Piece, ShardTensor | EncodedTensor]],
        dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> None:
        self.pieces = tuple(pieces)
        self.dtype = dtype
        self.shape = shape

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of all pieces."""
        return tuple(dict.fromkeys(source.shard for _, source in self.pieces))

    def over(self, twins: Callable[[Shard], Shard]) -> AssembledTensor:
        """Read the same pieces through other shard objects."""
        pieces = [(piece, source.over(twins)) for piece, source in self.pieces]
        return AssembledTensor(pieces, self.dtype, self.shape)

    def mapped(self) -> torch.Tensor | None:
        """Answer ``None``: the pieces lie apart."""
        return None

    def load(self) -> torch.Tensor:
        """Copy every piece from its mapping straight to its place, converting on the way.

        What is packed is decoded first, one of the stored tensors in memory at a time.
        """
        tensor = empty(self.dtype, self.shape)
        for piece, source in self.pieces:
            value = source.mapped()
            if value is None:
                value = source.load()
            part = value[piece.region] if piece.region else value
            if piece.permutation is not None:
                part = part.permute(piece.permutation)
            target = tensor[piece.target] if piece.target else tensor
            target.copy_(part)
        return tensor

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Assemble all of it, for any piece may have a part of any row; give these."""
        return self.load()[start:stop].clone()


class CastTensor:
    """A stored tensor read as another dtype."""

    def __init__(self, inner: Stored, dtype: torch.dtype) -> None:
        self.inner = inner
        self.dtype = dtype
        self.shape = inner.shape

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of the tensor that is converted."""
        return self.inner.shards

    def over(self, twins: Callable[[Shard], Shard]) -> CastTensor:
        """Convert the same value read through another shard object."""
        return CastTensor(self.inner.over(twins), self.dtype)

    def mapped(self) -> torch.Tensor | None:
        """Answer ``None``: the bytes in the file are of another dtype."""
        return None

    def load(self) -> torch.Tensor:
        """Convert into fresh memory."""
        source = self.inner.mapped()
        tensor = empty(self.dtype, self.shape)
        return tensor.copy_(self.inner.load() if source is None else source)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Convert these rows."""
        return self.inner.load_rows(start, stop).to(self.dtype)


class StridedTensor:
    """A stored tensor laid out in memory with strides of its own (a transposed weight)."""

    def __init__(self, inner: Stored, strides: tuple[int, ...]) -> None:
        self.inner = inner
        self.dtype = inner.dtype
        self.shape = inner.shape
        self.strides = strides

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of the tensor that is laid out."""
        return self.inner.shards

    def over(self, twins: Callable[[Shard], Shard]) -> StridedTensor:
        """Lay out the same value read through another shard object."""
        return StridedTensor(self.inner.over(twins), self.strides)

    def mapped(self) -> torch.Tensor | None:
        """Answer ``None``: files hold tensors row by row."""
        return None

    def load(self) -> torch.Tensor:
        """Copy into fresh memory with the wanted strides."""
        source = self.inner.mapped()
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        return tensor.copy_(self.inner.load() if source is None else source)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Give these rows, laid out row by row, as the file has them."""
        return self.inner.load_rows(start, stop)

    def without_gaps(self) -> Stored:
        """Lay out the same value with its elements side by side, as ``Tensor.clone`` does."""
        gapped = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        dense = torch.empty_like(gapped)
        return self.inner if dense.is_contiguous() else StridedTensor(self.inner, dense.stride())


def stored_tensors(shard: Shard) -> dict[str, ShardTensor | EncodedTensor]:
    """List what a file holds, packed tensors as what they stand for.

    Raises:
        DamagedFileError: the file's description of its packed tensors cannot be true, or is
            not the one that was written.
    """
    # Else what a damaged word stands for would be read as something else, and nobody told.
    must_match = describes_encodings(shard.header)
    digests = digests_of(shard.header, str(shard.path), must_match=must_match)
    packed = _encoded_tensors(shard, digests)
    return {
        name: packed.get(name) or ShardTensor(shard, spec, digests.get(name))
        for name, spec in shard.header.specs.items()
    }


def _encoded_tensors(
    shard: Shard, digests: Mapping[str, str]
) -> Mapping[str, EncodedTensor | None]:
    text = shard.header.metadata.get(ENCODING_KEY)
    if text is None:
        return {}

    def refuse(reason: str) -> NoReturn:
        raise DamagedFileError(
            f"{shard.path}: its metadata {ENCODING_KEY!r} {reason}; "
            "the file is damaged, write it again"
        )

    def read(name: str) -> EncodedTensor | None:
        encoding = reader.value(_MAX_ENCODING_BYTES)
        spec = shard.header.specs.get(name)
        return EncodedTensor(shard, spec, encoding, digests.get(name)) if spec else None

    reader = JsonReader(text.encode("utf-8"), refuse)
    found = reader.table(read)
    reader.finish()
    return found
