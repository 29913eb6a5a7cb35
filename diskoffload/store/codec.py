"""Lossless compression of a tensor's bytes, in chunks that can be decoded one by one.

A user names a way to compress ("zstd"); a file names the form of its bytes, which a codec
reads. The names differ because forms change and files stay: ``"zstd"`` in a file is the form
that earlier versions wrote, ``"zstd-planes"`` is the one that ``compression="zstd"`` writes
now. What a file names and this version does not know, or knows in an older version only, is
refused by its name. ``docs/format.md`` describes every form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from diskoffload.errors import DamagedFileError, InvalidInputError
from diskoffload.store.json_reader import brief
from diskoffload.store.workspace import Workspace
from diskoffload.store.zstd_frames import Zstd
from diskoffload.store.zstd_planes import ZstdPlanes


class Codec(Protocol):
    """Reads one form of packed chunks; stateless and thread-safe."""

    @property
    def name(self) -> str:
        """The word that stands for the form in files."""

    @property
    def compression(self) -> str:
        """The user's word for it."""

    @property
    def version(self) -> int:
        """The newest version of the form that is read; it is the one that is written."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the value in every chunk but the last, which has the rest."""

    @property
    def checks_chunks(self) -> bool:
        """Whether each chunk has a checksum of all its bytes, which unpacking compares."""

    def packed_range_bytes(self, nbytes: int, element_bytes: int) -> tuple[int, int]:
        """Give the least and the most bytes that a packed chunk of ``nbytes`` can have."""

    def unpack_chunk(
        self,
        packed: memoryview,
        target: memoryview,
        start: int,
        element_bytes: int,
        workspace: Workspace,
        where: str,
    ) -> None:
        """Decode one chunk.

        Args:
            packed: the chunk's bytes, and no others.
            target: where its part of the value goes; it must fill this exactly. What is in it
                after an error means nothing.
            start: where that part begins in the value, in bytes.
            element_bytes: as :func:`element_bytes_of` has it.
            workspace: of the calling thread.
            where: file and tensor, for messages.

        Raises:
            DamagedFileError: it is not what was written, or cannot be what is expected.
        """


class WritingCodec(Codec, Protocol):
    """Writes its form as well."""

    def pack_chunk(
        self, data: memoryview, start: int, element_bytes: int, workspace: Workspace
    ) -> list[memoryview]:
        """Give the packed form of ``data``, which begins at byte ``start`` of the value.

        It is in parts, which are to be put one after the other. They lie in the workspace:
        its next use ends them.
        """


def element_bytes_of(dtype: torch.dtype) -> int:
    """Tell how long the numbers are that a value's bytes are split by: 1, 2, 4 or 8.

    Of complex elements it is the length of a part: both are numbers of the same kind.
    """
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def can_hold(codec: Codec, chunks_bytes: Sequence[int], nbytes: int, element_bytes: int) -> bool:
    """Tell whether packed chunks of these lengths can hold ``nbytes`` bytes.

    Asked before any memory is taken, for what a file says they hold or for themselves.
    """
    whole, rest = divmod(nbytes, codec.chunk_bytes)
    if len(chunks_bytes) != whole + (rest > 0):
        return False
    if rest:
        least, most = codec.packed_range_bytes(rest, element_bytes)
        if not least <= chunks_bytes[-1] <= most:
            return False
    least, most = codec.packed_range_bytes(codec.chunk_bytes, element_bytes)
    return all(least <= packed <= most for packed in chunks_bytes[:whole])


_WRITTEN: dict[str, WritingCodec] = {"zstd": ZstdPlanes()}
_READ: dict[str, Codec] = {codec.name: codec for codec in (Zstd(), ZstdPlanes())}


def codec_named(compression: str) -> WritingCodec:
    """Find what writes what a user calls ``compression``.

    Raises:
        InvalidInputError: there is no such way to compress.
    """
    try:
        return _WRITTEN[compression]
    except (KeyError, TypeError):
        known = ", ".join(sorted(_WRITTEN))
        raise InvalidInputError(
            f"unknown compression {compression!r}; use None or one of: {known}"
        ) from None


def codec_of_form(name: str, version: int, where: str) -> Codec:
    """Find what reads the form that a file names.

    Args:
        name: the file's word for the form.
        version: of the form.
        where: file and tensor, for messages.

    Raises:
        DamagedFileError: this version of ours does not know it.
    """
    codec = _READ.get(name)
    if codec is None:
        known = ", ".join(sorted(_READ))
        raise DamagedFileError(
            f"{where} is compressed with the unknown codec {brief(name)} (known: {known}); "
            "a newer diskoffload may read it"
        )
    if not 1 <= version <= codec.version:
        raise DamagedFileError(
            f"{where} is compressed with version {version} of the codec {name!r}, and up to "
            f"version {codec.version} is known; a newer diskoffload may read it"
        )
    return codec
