"""Tensors of our own files that are not stored as themselves: packed, or of a type of ours.

The file's metadata say what they are. None of it is believed before it was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.codec import Codec, can_hold, codec_of_form, element_bytes_of
from diskoffload.store.digests import Checking
from diskoffload.store.header import Header, StoredSpec, can_be_a_tensor
from diskoffload.store.json_reader import brief
from diskoffload.store.parallel import share
from diskoffload.store.shard import Shard
from diskoffload.store.workspace import Workspace
from diskoffload.system.memory import empty, tensor_bytes

ENCODING_KEY = "diskoffload.encoding"
RAW = "raw"
_SIGN_OF_AN_ENCODING = '{"codec": "'
# What the kernel is asked to read while chunks are decoded.
_AHEAD_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where one packed chunk lies, and what it stands for.

    Attributes:
        number: counted from 0.
        offset: its first byte in the file.
        packed_bytes: its length there.
        start: its first byte in the value.
        nbytes: its length there.
    """

    number: int
    offset: int
    packed_bytes: int
    start: int
    nbytes: int


class EncodedTensor:
    """One tensor of our own files whose bytes are packed, or of a type the format lacks.

    Attributes:
        codec_name: the file's word for its form; ``"raw"`` if only the type is lacking.
        compression: the user's word for how it is packed, or ``None`` if it is not.
        nbytes: bytes of the value.
        chunks: lengths of the packed chunks in the file.
    """

    def __init__(
        self,
        shard: Shard,
        spec: StoredSpec,
        encoding: Mapping[str, Any],
        digest: str | None = None,
    ) -> None:
        """Check what the file says of the tensor.

        Raises:
            DamagedFileError: it cannot be true, or is not known to this version of ours.
        """
        self.shard = shard
        self.spec = spec
        self.digest = digest
        where = self._where
        try:
            self.codec_name = str(encoding["codec"])
            version = _size(encoding.get("version", 1))
            self._codec = self._codec_of(version, where)
            self.dtype = _dtype_named(encoding["dtype"])
            self.shape = _sizes(encoding["shape"])
            self.chunks = _sizes(encoding.get("chunks", [spec.nbytes]))
        except DamagedFileError:  # which is a ValueError as well
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFileError(f"{where}: its encoding cannot be read ({error!r})") from error
        if not can_be_a_tensor(self.dtype, self.shape):
            raise DamagedFileError(f"{where}: its encoding says the shape {brief(self.shape)}")
        self.nbytes = prod(self.shape) * self.dtype.itemsize
        if sum(self.chunks) != spec.nbytes:
            raise DamagedFileError(f"{where}: its chunks do not add up to {spec.nbytes} bytes")
        self._element_bytes = element_bytes_of(self.dtype)
        if self._codec is None:
            possible = spec.nbytes == self.nbytes
        else:
            possible = can_hold(self._codec, self.chunks, self.nbytes, self._element_bytes)
        if not possible:
            raise DamagedFileError(f"{where}: its chunks cannot hold {self.nbytes} bytes")

    def _codec_of(self, version: int, where: str) -> Codec | None:
        if self.codec_name == RAW and version == 1:
            return None
        return codec_of_form(self.codec_name, version, where)

    @property
    def _where(self) -> str:
        return f"{self.shard.path}, tensor {brief(self.spec.name)}"

    @property
    def compression(self) -> str | None:
        """The user's word for how it is packed; ``None`` if it is not."""
        return None if self._codec is None else self._codec.compression

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
        if self._codec is not None or self.spec.offset % self.dtype.itemsize:
            return None
        return self.shard.mapped_as(self.spec, self.dtype, self.shape)

    # ------------------------------------------------------------------ chunks

    @property
    def has_checked_chunks(self) -> bool:
        """Whether it is packed in chunks of which each has a checksum."""
        return self._codec is not None and self._codec.checks_chunks

    @property
    def chunk_count(self) -> int:
        """How many chunks can be decoded one by one; 0 where nothing is packed."""
        return 0 if self._codec is None else len(self.chunks)

    @cached_property
    def _begins(self) -> list[int]:
        return [0, *accumulate(self.chunks)]

    def chunk(self, number: int) -> Chunk:
        """Tell where a chunk lies and what it stands for."""
        assert self._codec is not None  # else there are none
        start = number * self._codec.chunk_bytes
        nbytes = min(self._codec.chunk_bytes, self.nbytes - start)
        offset = self.spec.offset + self._begins[number]
        return Chunk(number, offset, self.chunks[number], start, nbytes)

    def unpack_chunk(
        self,
        number: int,
        packed: memoryview,
        target: memoryview,
        workspace: Workspace | None = None,
    ) -> None:
        """Decode one chunk; thread-safe, and without the interpreter's lock where it takes long.

        Args:
            number: the chunk's, below :attr:`chunk_count`.
            packed: its bytes, as they are in the file.
            target: writable; ``chunk(number).nbytes`` bytes, the value's from
                ``chunk(number).start`` on. After an error anything may be in it.
            workspace: of the calling thread, which should use one for many chunks.

        Raises:
            DamagedFileError: the bytes are not those that were written. Of files of earlier
                versions (the codec ``"zstd"``) most damage is found, by zstandard's checksum.
        """
        assert self._codec is not None  # else there are none
        self._codec.unpack_chunk(
            packed,
            target,
            number * self._codec.chunk_bytes,
            self._element_bytes,
            workspace or Workspace(),
            f"{self._where}, chunk {number}",
        )

    # ------------------------------------------------------------------ values

    def load(self) -> torch.Tensor:
        """Decode into fresh memory, a few chunks at once.

        Raises:
            DamagedFileError: the bytes are not those that were written.
            StorageError: they cannot be read.
        """
        tensor = empty(self.dtype, self.shape)
        target = tensor_bytes(tensor)
        check = Checking(str(self.shard.path), self.spec.name, self.spec.offset, self.digest)
        if self._codec is None:
            self.shard.read_into(self.spec, target)
            check.add(target)
            check.finish()
        elif self._codec.checks_chunks:
            self._unpack(target, 0)
        else:
            self._unpack_in_order(target, check)
        return tensor

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Decode only the chunks that have bytes of these rows; see ``Stored.load_rows``."""
        self.shard.check_first_read(self.spec, self.digest)
        tensor = empty(self.dtype, (stop - start, *self.shape[1:]))
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        self.read_value(tensor_bytes(tensor), start * row_bytes)
        return tensor

    def read_value(self, target: memoryview, start: int) -> None:
        """Decode the value's bytes from ``start`` on, chunks of which each has a checksum.

        Raises:
            DamagedFileError: the bytes are not those that were written.
            StorageError: they cannot be read.
        """
        if self._codec is None:
            self.shard.read_into(self.spec, target, start)
        else:
            self._unpack(target, start)

    def _unpack(self, target: memoryview, begin: int) -> None:
        """Decode the value's bytes from ``begin`` on into ``target``."""
        assert self._codec is not None  # it is packed
        if not target:
            return
        chunk_bytes, end = self._codec.chunk_bytes, begin + len(target)
        first, last = begin // chunk_bytes, (end - 1) // chunk_bytes

        def work(numbers: Iterator[int]) -> None:
            workspace = Workspace()
            for number in numbers:
                if number % _AHEAD_CHUNKS == 0:
                    self._prefetch(first + number + _AHEAD_CHUNKS, last)
                chunk = self.chunk(first + number)
                packed = workspace.buffer("packed", chunk.packed_bytes).data
                self.shard.read_into(self.spec, packed, chunk.offset - self.spec.offset)
                from_byte = max(begin - chunk.start, 0)
                to_byte = min(end - chunk.start, chunk.nbytes)
                at = chunk.start + from_byte - begin
                wanted = target[at : at + to_byte - from_byte]
                if len(wanted) == chunk.nbytes:
                    self.unpack_chunk(chunk.number, packed, wanted, workspace)
                    continue
                whole = workspace.buffer("chunk", chunk.nbytes).data
                self.unpack_chunk(chunk.number, packed, whole, workspace)
                wanted[:] = whole[from_byte:to_byte]

        share(last - first + 1, work)

    def _prefetch(self, number: int, last: int) -> None:
        """Have the kernel read chunks while those before them are decoded."""
        if number <= last:
            start = self._begins[number]
            stop = self._begins[min(number + _AHEAD_CHUNKS, last + 1)]
            with suppress(StorageError):  # who reads it is told
                self.shard.prefetch(self.spec, start, stop)

    def _unpack_in_order(self, target: memoryview, check: Checking) -> None:
        """Decode chunks that have no checksum of all their bytes; the tensor's own has to do."""
        workspace = Workspace()
        for number in range(self.chunk_count):
            chunk = self.chunk(number)
            packed = workspace.buffer("packed", chunk.packed_bytes).data
            self.shard.read_into(self.spec, packed, chunk.offset - self.spec.offset)
            check.add(packed)
            wanted = target[chunk.start : chunk.start + chunk.nbytes]
            self.unpack_chunk(number, packed, wanted, workspace)
        check.finish()


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
    return tuple(map(_size, values))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:  # a bool is an int
        raise ValueError(f"{brief(value)} is no size")
    return value


def encoding_of(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    codec: Codec | None = None,
    chunks: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Describe a tensor that is not stored as itself, for its file's metadata.

    Args:
        dtype: of the value.
        shape: of the value.
        codec: what packed it, or ``None`` where only the type is lacking.
        chunks: lengths of the packed chunks.
    """
    described: dict[str, Any] = {
        "codec": RAW if codec is None else codec.name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if codec is not None:
        described["version"] = codec.version
        described["chunks"] = list(chunks or [])
    return described


def describes_encodings(header: Header) -> bool:
    """Whether a file says, or once said, that tensors of it are not stored as themselves.

    The second is one whose word for that was damaged.
    """
    return ENCODING_KEY in header.metadata or any(
        _SIGN_OF_AN_ENCODING in text for text in header.metadata.values()
    )
