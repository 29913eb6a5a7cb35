"""Where one tensor's value comes from: a range of a file, or something made of ranges.

Everything above the store sees a :class:`Stored`: it has a dtype and a shape, can fill a
buffer, and, where the bytes in the file are the tensor's own, can be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from math import prod
from typing import Any, NoReturn, Protocol

import torch

from diskoffload.errors import DamagedFileError
from diskoffload.store.codec import CHUNK_BYTES, can_hold, codec_named
from diskoffload.store.digests import Checking, digests_of
from diskoffload.store.header import StoredSpec, can_be_a_tensor
from diskoffload.store.json_reader import JsonReader, brief
from diskoffload.store.recipe import Piece
from diskoffload.store.shard import Shard
from diskoffload.system.memory import empty, tensor_bytes

ENCODING_KEY = "diskoffload.encoding"
RAW = "raw"
# Of the JSON that describes one packed tensor: enough for the chunks of 500 GB.
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
    def shards(self) -> tuple[Shard, ...]:
        """The one file."""
        return (self.shard,)

    def over(self, twins: Callable[[Shard], Shard]) -> ShardTensor:
        """Read the same range through another shard object."""
        return ShardTensor(twins(self.shard), self.spec, self.digest)

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
        check = Checking(str(self.shard.path), self.spec.name, self.spec.offset, self.digest)
        check.add(tensor_bytes(tensor))
        check.finish()
        return tensor


class EncodedTensor:
    """One tensor of our own files whose bytes are packed, or of a type the format lacks."""

    def __init__(
        self,
        shard: Shard,
        spec: StoredSpec,
        encoding: Mapping[str, Any],
        digest: str | None = None,
    ) -> None:
        """Check what the file says of the tensor.

        Raises:
            DamagedFileError: it cannot be true.
        """
        self.shard = shard
        self.spec = spec
        self.digest = digest
        where = f"{shard.path}, tensor {brief(spec.name)}"
        try:
            self.dtype = _dtype_named(encoding["dtype"])
            self.shape = _sizes(encoding["shape"])
            self.codec_name = str(encoding["codec"])
            self.chunks = _sizes(encoding.get("chunks", [spec.nbytes]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{where}: its encoding cannot be read ({error!r})") from error
        if not can_be_a_tensor(self.dtype, self.shape):
            raise DamagedFileError(f"{where}: its encoding says the shape {brief(self.shape)}")
        self.nbytes = prod(self.shape) * self.dtype.itemsize
        if sum(self.chunks) != spec.nbytes:
            raise DamagedFileError(f"{where}: its chunks do not add up to {spec.nbytes} bytes")
        if self.codec_name == RAW:
            possible = spec.nbytes == self.nbytes
        else:
            self._codec = codec_named(self.codec_name, where=where)
            possible = can_hold(self._codec, self.chunks, self.nbytes)
        if not possible:
            raise DamagedFileError(f"{where}: its chunks cannot hold {self.nbytes} bytes")

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The one file."""
        return (self.shard,)

    def over(self, twins: Callable[[Shard], Shard]) -> EncodedTensor:
        """Read the same range through another shard object."""
        made = copy(self)
        made.shard = twins(self.shard)
        return made

    def mapped(self) -> torch.Tensor | None:
        """Alias the file where only the format's word for the dtype is lacking."""
        self.shard.check_first_read(self.spec, self.digest)
        if self.codec_name != RAW or self.spec.offset % self.dtype.itemsize:
            return None
        return self.shard.mapped_as(self.spec, self.dtype, self.shape)

    def load(self) -> torch.Tensor:
        """Decode into fresh memory, a chunk at a time."""
        tensor = empty(self.dtype, self.shape)
        target = tensor_bytes(tensor)
        check = Checking(str(self.shard.path), self.spec.name, self.spec.offset, self.digest)
        if self.codec_name == RAW:
            self.shard.read_into(self.spec, target)
            check.add(target)
            check.finish()
            return tensor
        start = 0
        for number, size in enumerate(self.chunks):
            packed = bytearray(size)
            self.shard.read_into(self.spec, memoryview(packed), start)
            check.add(packed)
            begin = number * CHUNK_BYTES
            where = f"{self.shard.path}, tensor {brief(self.spec.name)}, chunk {number}"
            self._codec.unpack_into(bytes(packed), target[begin : begin + CHUNK_BYTES], where)
            start += size
        check.finish()
        return tensor


class AssembledTensor:
    """A tensor put together from pieces of stored ones, in their dtype."""

    def __init__(
        self,
        pieces: Sequence[tuple[Piece, ShardTensor]],
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
        """Copy every piece from its mapping straight to its place, converting on the way."""
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

    def without_gaps(self) -> Stored:
        """Lay out the same value with its elements side by side, as ``Tensor.clone`` does."""
        gapped = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        dense = torch.empty_like(gapped)
        return self.inner if dense.is_contiguous() else StridedTensor(self.inner, dense.stride())


def _dtype_named(name: Any) -> torch.dtype:
    # Not getattr, which has torch import whatever module is named.
    dtype = vars(torch).get(name)
    # A quantized tensor is more than its bytes.
    if not isinstance(dtype, torch.dtype) or name.startswith(("qint", "quint")):
        raise ValueError(f"unknown dtype {brief(name)}")
    return dtype


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{brief(values)} is no list")
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 63:  # a bool is an int
            raise ValueError(f"{brief(value)} is no size")
    return tuple(values)


def encoding_of(
    dtype: torch.dtype, shape: tuple[int, ...], codec: str, chunks: Sequence[int] | None = None
) -> dict[str, Any]:
    """Describe a tensor that is not stored as itself, for its file's metadata."""
    described: dict[str, Any] = {
        "codec": codec,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if chunks is not None:
        described["chunks"] = list(chunks)
    return described


def stored_tensors(shard: Shard) -> dict[str, ShardTensor | EncodedTensor]:
    """List what a file holds, packed tensors as what they stand for.

    Raises:
        DamagedFileError: the file's description of its packed tensors cannot be true.
    """
    digests = digests_of(shard.header, str(shard.path))
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
