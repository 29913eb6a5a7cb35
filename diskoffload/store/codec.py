"""Lossless compression of a tensor's bytes, in chunks that can be decoded one by one.

A codec is found by the name that a file gives it. Chunks keep memory bounded: coding and
decoding work on one chunk at a time, into a buffer that is reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import zstandard

from diskoffload.errors import DamagedFileError, InvalidInputError
from diskoffload.store.json_reader import brief

CHUNK_BYTES = 4 << 20
_BLOCK_BYTES = 128 << 10
_MOST_FRAMING_BYTES = 128


class Codec(Protocol):
    """Packs bytes and unpacks them, chunk by chunk; stateless and thread-safe."""

    @property
    def name(self) -> str:
        """The word that stands for it in files."""

    def pack(self, data: memoryview) -> Iterator[bytes]:
        """Give the packed form of every chunk of ``data`` in order."""

    def packed_range_bytes(self, nbytes: int) -> tuple[int, int]:
        """Give the least and the most bytes that a packed chunk of ``nbytes`` can have."""

    def unpack_into(self, packed: bytes, target: memoryview, where: str) -> None:
        """Decode one chunk that must fill ``target`` exactly; ``where`` is for messages."""


@dataclass(frozen=True)
class Zstd:
    """zstandard at a level chosen for speed (https://github.com/facebook/zstd)."""

    name: str = "zstd"
    level: int = 1

    def pack(self, data: memoryview) -> Iterator[bytes]:
        """Give one zstd frame a chunk."""
        compressor = zstandard.ZstdCompressor(level=self.level, write_checksum=True)
        for start in range(0, len(data), CHUNK_BYTES):
            yield compressor.compress(data[start : start + CHUNK_BYTES])

    def packed_range_bytes(self, nbytes: int) -> tuple[int, int]:
        """Bound a frame, as the format has it (RFC 8878, 3.1.1) and as we write it.

        Every block of at most 128 KiB takes at least 4 bytes, which bounds what a file can
        claim to hold. Bytes that do not shrink are stored with 3 more a block, which is
        rounded up here to a 256th, as zstd's own ``ZSTD_compressBound`` does.
        """
        return 4 * -(-nbytes // _BLOCK_BYTES), nbytes + (nbytes >> 8) + _MOST_FRAMING_BYTES

    def unpack_into(self, packed: bytes, target: memoryview, where: str) -> None:
        """Decode one frame.

        Raises:
            DamagedFileError: it is not a frame, or one of another size.
        """
        try:
            size = zstandard.frame_content_size(packed)
            if size != len(target):
                raise DamagedFileError(
                    f"{where}: a compressed chunk says it holds {size} bytes and "
                    f"{len(target)} are expected; the file is damaged, write it again"
                )
            target[:] = zstandard.ZstdDecompressor().decompress(
                packed, len(target), allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise DamagedFileError(
                f"{where}: a compressed chunk cannot be decoded ({error}); "
                "the file is damaged, write it again"
            ) from error


def can_hold(codec: Codec, chunks_bytes: Sequence[int], nbytes: int) -> bool:
    """Tell whether packed chunks of these lengths can hold ``nbytes`` bytes.

    Asked before any memory is taken, for what a file says they hold or for themselves.
    """
    whole, rest = divmod(nbytes, CHUNK_BYTES)
    if len(chunks_bytes) != whole + (rest > 0):
        return False
    if rest:
        least, most = codec.packed_range_bytes(rest)
        if not least <= chunks_bytes[-1] <= most:
            return False
    least, most = codec.packed_range_bytes(CHUNK_BYTES)
    return all(least <= packed <= most for packed in chunks_bytes[:whole])


_CODECS: dict[str, Codec] = {"zstd": Zstd()}


def codec_named(name: str, *, where: str | None = None) -> Codec:
    """Find a codec.

    Args:
        name: its name.
        where: the file that names it, or ``None`` when the user does.

    Raises:
        InvalidInputError: the user named one that does not exist.
        DamagedFileError: a file did.
    """
    try:
        return _CODECS[name]
    except KeyError:
        known = ", ".join(sorted(_CODECS))
        if where is None:
            raise InvalidInputError(
                f"unknown compression {name!r}; use None or one of: {known}"
            ) from None
        raise DamagedFileError(
            f"{where} is compressed with the unknown codec {brief(name)} (known: {known}); "
            "a newer diskoffload may read it"
        ) from None
