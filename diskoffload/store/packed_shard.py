"""A safetensors file being packed: another one's tensors, compressed where that pays.

How long each will be is known only when it was packed. So room is left for the longest header
there could be, tensors follow one another as they come, and the header is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from diskoffload.store.appended_file import AppendedFile
from diskoffload.store.buffers import Buffers
from diskoffload.store.codec import WritingCodec, element_bytes_of
from diskoffload.store.digests import (
    DIGESTS_KEY,
    Checking,
    digests_as_text,
    digests_to_come,
)
from diskoffload.store.encoded import ENCODING_KEY, encoding_of
from diskoffload.store.header import (
    ALIGNMENT_BYTES,
    FILLER_PREFIX,
    Header,
    Planned,
    build_header_of,
)
from diskoffload.store.packed_source import SOURCE_KEY, source_as_text
from diskoffload.store.packing import pack
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor
from diskoffload.store.value_parts import value_parts
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes

_DIGEST = "0" * 32


@dataclass(frozen=True)
class Placed:
    """A tensor that was written.

    Attributes:
        name: its key.
        begin: its first byte, counted from the first tensor's.
        nbytes: bytes in the file.
        digest: xxh3-128 of them, in hexadecimal.
        value_digest: the same of its value.
        chunks: lengths of its packed chunks; ``None`` if it is stored as itself.
    """

    name: str
    begin: int
    nbytes: int
    digest: str
    value_digest: str
    chunks: list[int] | None


class PackedShard:
    """The packed form of one file, while it is written. Not thread-safe."""

    def __init__(
        self,
        path: Path,
        source: Shard,
        codec: WritingCodec,
        files: Files,
        noted: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            path: the packed file's name.
            source: the file; no tensor of it is packed.
            codec: packs what is to be packed.
            files: the file operations.
            noted: what :meth:`note` gave after the last :meth:`sync` of an earlier writer.

        Raises:
            InvalidInputError: the file has more tensors than can be described.
            StorageError: a file cannot be read or made.
        """
        self._source = source
        self._codec = codec
        self._spare = Buffers()
        self._head = bytearray(source.header.data_offset)
        source.read_at(0, memoryview(self._head))
        most, self._data_offset = self._bounds()
        self._placed = [Placed(**one) for one in noted["placed"]] if noted else []
        end = None
        if noted is not None:
            last = self._placed[-1] if self._placed else None
            end = self._data_offset + (last.begin + last.nbytes if last else 0)
        self._file = AppendedFile(path, files, self._data_offset, most, end)

    @property
    def done(self) -> list[str]:
        """Names of the tensors that were written."""
        return [one.name for one in self._placed]

    @property
    def written_bytes(self) -> int:
        """Bytes of the file so far."""
        return self._file.end

    def note(self) -> dict[str, Any]:
        """Give what a later writer needs to go on from here, as :func:`json.dumps` takes it."""
        return {"placed": [asdict(one) for one in self._placed]}

    def add(self, tensor: ShardTensor, *, packed: bool) -> None:
        """Write the source's next tensor, packed if that is wanted and pays.

        Raises:
            DamagedFileError: the source was changed, or is not what its own checksums say.
            StorageError: it cannot be read, or the file cannot be written.
        """
        made = self._packed(tensor) if packed and tensor.nbytes else None
        made = made or self._as_it_is(tensor)
        tensor.shard.check_unchanged()
        spec = tensor.spec
        Checking(str(tensor.shard.path), spec.name, spec.offset, tensor.digest).compare(
            made.value_digest
        )
        self._placed.append(made)
        tensor.shard.drop_tensor_behind(spec)

    def _packed(self, tensor: ShardTensor) -> Placed | None:
        # As bytes, which can be mapped wherever they lie.
        value = tensor.shard.mapped_as(tensor.spec, torch.uint8, (tensor.nbytes,))
        data = tensor_bytes(tensor.load() if value is None else value)
        made = pack(data, element_bytes_of(tensor.dtype), self._codec, self._spare)
        if made is None:
            return None
        placed = Placed(
            name=tensor.spec.name,
            begin=self._file.end - self._data_offset,
            nbytes=made.nbytes,
            digest=self._append(made.chunks),
            value_digest=made.digest.hex(),
            chunks=[*map(len, made.chunks)],
        )
        made.release()
        return placed

    def _append(self, parts: list[memoryview]) -> str:
        digest = xxhash.xxh3_128()
        for part in parts:
            digest.update(part)
            self._file.append(part)
        return digest.hexdigest()

    def _as_it_is(self, tensor: ShardTensor) -> Placed:
        """Copy a tensor to the next multiple of 64 bytes, where it can be mapped."""
        self._file.append(memoryview(bytes(-self._file.end % ALIGNMENT_BYTES)))
        begin, digest = self._file.end, xxhash.xxh3_128()
        for part in value_parts(tensor, digest):
            self._file.append(part)
        found = digest.hexdigest()
        place = begin - self._data_offset
        return Placed(tensor.spec.name, place, tensor.nbytes, found, found, None)

    def sync(self) -> None:
        """Make durable what was written, so that :meth:`note` is true of it."""
        self._file.sync()

    def leave(self) -> None:
        """Close the file and leave what was synced of it."""
        self._file.leave()

    def publish(self) -> None:
        """Write the header, and give the file its name; every tensor must have been added."""
        _, header = self._header(self._placed)
        digests = {one.name: one.digest for one in self._placed}
        raw, _ = self._header(self._placed, digests_as_text(header, digests))
        self._file.publish(raw)

    # ------------------------------------------------------------------ the header

    def _bounds(self) -> tuple[int, int]:
        """Find the file's largest length, and where its tensors begin: all at their worst."""
        codec = self._codec
        placed: list[Placed] = []
        end = 0
        for spec in self._source.header.specs.values():
            size = element_bytes_of(spec.dtype)
            whole, rest = divmod(spec.nbytes, codec.chunk_bytes)
            lengths = [codec.chunk_bytes] * whole + ([rest] if rest else [])
            chunks = [codec.packed_range_bytes(one, size)[1] for one in lengths]
            begin = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + ALIGNMENT_BYTES
            placed.append(Placed(spec.name, begin, sum(chunks), _DIGEST, _DIGEST, chunks))
            end = begin + sum(chunks)
        _, header = self._header(placed, data_offset=None)
        return header.file_bytes, header.data_offset

    def _header(
        self, placed: Sequence[Placed], digests: str = "", data_offset: int | None = -1
    ) -> tuple[bytes, Header]:
        specs = self._source.header.specs
        encodings = {
            one.name: encoding_of(
                specs[one.name].dtype, specs[one.name].shape, self._codec, one.chunks
            )
            for one in placed
            if one.chunks is not None
        }
        values = {one.name: one.value_digest for one in placed}
        own = {
            ENCODING_KEY: json.dumps(encodings),
            SOURCE_KEY: source_as_text(bytes(self._head), self._source.header.file_bytes, values),
            DIGESTS_KEY: digests or digests_to_come(values),
        }
        metadata = {**self._source.header.metadata, **own}
        if data_offset == -1:
            data_offset = self._data_offset
        return build_header_of(self._lay_out(placed), metadata, data_offset)

    def _lay_out(self, placed: Sequence[Placed]) -> list[tuple[Planned, int]]:
        """List the file's entries, what fills gaps among them."""
        specs = self._source.header.specs
        found: list[tuple[Planned, int]] = []
        end = 0
        for number, one in enumerate(placed):
            if one.begin > end:
                filler = (f"{FILLER_PREFIX}{number}", torch.uint8, (one.begin - end,))
                found.append((filler, end))
            dtype, shape = specs[one.name].dtype, specs[one.name].shape
            if one.chunks is not None:
                dtype, shape = torch.uint8, (one.nbytes,)
            found.append(((one.name, dtype, shape), one.begin))
            end = one.begin + one.nbytes
        return found
