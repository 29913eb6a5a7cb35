"""Compressed chunks as earlier versions wrote them: one zstd frame each. Only read."""

from __future__ import annotations

from dataclasses import dataclass

import zstandard

from diskoffload.errors import DamagedFileError
from diskoffload.store.workspace import Workspace

_BLOCK_BYTES = 128 << 10
_MOST_FRAMING_BYTES = 128


@dataclass(frozen=True)
class Zstd:
    """Chunks of 4 MiB, each a frame with zstandard's own checksum (RFC 8878)."""

    name: str = "zstd"
    compression: str = "zstd"
    version: int = 1
    chunk_bytes: int = 4 << 20
    checks_chunks: bool = False

    def packed_range_bytes(self, nbytes: int, element_bytes: int) -> tuple[int, int]:
        """Bound a frame, as the format has it (RFC 8878, 3.1.1) and as it was written.

        Every block of at most 128 KiB takes at least 4 bytes, which bounds what a file can
        claim to hold. Bytes that do not shrink are stored with 3 more a block, which is
        rounded up here to a 256th, as zstd's own ``ZSTD_compressBound`` does.
        """
        return 4 * -(-nbytes // _BLOCK_BYTES), nbytes + (nbytes >> 8) + _MOST_FRAMING_BYTES

    def unpack_chunk(
        self,
        packed: memoryview,
        target: memoryview,
        start: int,
        element_bytes: int,
        workspace: Workspace,
        where: str,
    ) -> None:
        """Decode one frame; raises :class:`DamagedFileError` if it is none, or another's."""
        try:
            size = zstandard.frame_content_size(packed)
            if size != len(target):
                raise DamagedFileError(
                    f"{where}: a compressed chunk says it holds {size} bytes and "
                    f"{len(target)} are expected; the file is damaged, write it again"
                )
            decompressor = workspace.tool("decompressor", zstandard.ZstdDecompressor)
            target[:] = decompressor.decompress(packed, len(target), allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DamagedFileError(
                f"{where}: a compressed chunk cannot be decoded ({error}); "
                "the file is damaged, write it again"
            ) from error
