"""Compressed chunks as they are written: the planes of a tensor's bytes, those packed that pay.

``docs/format.md`` describes the bytes; what is written here is version 1. A chunk is a head,
then what is stored of its planes. Planes come from :mod:`diskoffload.store.planes`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import xxhash
import zstandard

from diskoffload.errors import DamagedFileError
from diskoffload.store.planes import ELEMENT_SIZES, join, split
from diskoffload.store.workspace import Bytes, Workspace

# xxh3-64 of all that follows; where the chunk's bytes begin in the value and how many they
# are; bytes of an element; three zeros.
_HEAD = struct.Struct("<QQIB3s")
_CHECKSUM_BYTES = 8
# Kind; the byte that a constant plane repeats, else zero; a zero; bytes stored.
_PLANE = struct.Struct("<BBHI")
RAW, PACKED, CONSTANT = 0, 1, 2
# A plane that saves less than a sixteenth costs more to decode than it gives.
_PLANE_PAYS = 15 / 16
_SAMPLED_FROM_BYTES = 128 << 10
_SAMPLES, _SAMPLE_BYTES = 4, 4 << 10


def _compressor() -> zstandard.ZstdCompressor:
    # Next to no search for matches: what floating-point numbers have to give is in the
    # frequencies of their bytes, and then decoding is at its fastest.
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=6,
        target_length=0,
        write_content_size=True,
        write_checksum=False,  # the head has one, of raw planes too
        write_dict_id=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


@dataclass(frozen=True)
class ZstdPlanes:
    """Packs chunks of 1 MiB of a value, plane by plane; stateless and thread-safe."""

    name: str = "zstd-planes"
    compression: str = "zstd"
    version: int = 1
    chunk_bytes: int = 1 << 20
    checks_chunks: bool = True

    def packed_range_bytes(self, nbytes: int, element_bytes: int) -> tuple[int, int]:
        """Bound a chunk: all of its planes constant, or all raw."""
        head_bytes = _head_bytes(element_bytes)
        return head_bytes, head_bytes + nbytes

    def pack_chunk(
        self, data: memoryview, start: int, element_bytes: int, workspace: Workspace
    ) -> list[memoryview]:
        """Pack the bytes of a value from ``start`` on; ``data`` must not change meanwhile."""
        assert element_bytes in ELEMENT_SIZES
        values = np.frombuffer(data, np.uint8)
        count = len(values) // element_bytes
        if element_bytes == 1:
            planes: list[Bytes] = [values]
        else:
            planes = [workspace.buffer(("plane", n), count) for n in range(element_bytes)]
            split(values, planes, workspace)
        head = bytearray(_HEAD.pack(0, start, len(values), element_bytes, bytes(3)))
        stored: list[memoryview] = []
        for number, plane in enumerate(planes):
            # The last one, with the exponents, nearly always pays, and says so soon if not.
            is_tried = count < _SAMPLED_FROM_BYTES or number == element_bytes - 1 > 0
            kind, constant, kept = _pack_plane(plane, number, workspace, is_tried)
            head += _PLANE.pack(kind, constant, 0, len(kept))
            stored.append(kept)
        digest = xxhash.xxh3_64(head[_CHECKSUM_BYTES:])
        for kept in stored:
            digest.update(kept)
        head[:_CHECKSUM_BYTES] = digest.intdigest().to_bytes(_CHECKSUM_BYTES, "little")
        return [memoryview(head), *stored]

    def unpack_chunk(
        self,
        packed: memoryview,
        target: memoryview,
        start: int,
        element_bytes: int,
        workspace: Workspace,
        where: str,
    ) -> None:
        """Decode one chunk; all that it says of itself is checked before anything is decoded."""
        planes = _checked_planes(packed, len(target), start, element_bytes, where)
        values = np.frombuffer(target, np.uint8)
        decompressor = workspace.tool("decompressor", zstandard.ZstdDecompressor)
        found: list[Bytes | int] = []
        for number, (kind, constant, stored) in enumerate(planes):
            if kind == CONSTANT:
                found.append(constant)
            elif kind == RAW:
                found.append(np.frombuffer(stored, np.uint8))
            else:
                count = len(target) // element_bytes
                plane = values
                if element_bytes > 1:
                    plane = workspace.buffer(("plane", number), count)
                _decode(stored, plane, decompressor, f"{where}, plane {number}")
                found.append(plane)
        if found[0] is not values:  # else it was decoded in its place
            join(found, values, workspace)


def _head_bytes(element_bytes: int) -> int:
    return _HEAD.size + element_bytes * _PLANE.size


def _pack_plane(
    plane: Bytes, number: int, workspace: Workspace, is_tried: bool
) -> tuple[int, int, memoryview]:
    first = plane[0]
    if (plane[:64] == first).all() and (plane == first).all():
        return CONSTANT, int(first), memoryview(b"")
    if is_tried or _seems_to_pay(plane, workspace):
        packed = _compressed(plane, ("packed", number), workspace)
        if packed is not None:
            return PACKED, 0, packed
    return RAW, 0, plane.data


def _seems_to_pay(plane: Bytes, workspace: Workspace) -> bool:
    step = (len(plane) - _SAMPLE_BYTES) // (_SAMPLES - 1)
    parts = [plane[n * step : n * step + _SAMPLE_BYTES] for n in range(_SAMPLES)]
    return _compressed(np.concatenate(parts), "sample", workspace) is not None


def _compressed(plane: Bytes, use: object, workspace: Workspace) -> memoryview | None:
    """Give a frame of the plane in a buffer of the workspace, or ``None`` if it does not pay."""
    most_bytes = int(len(plane) * _PLANE_PAYS)
    target = workspace.buffer(use, max(most_bytes, 1)).data
    # Not compress(), which takes and leaves memory for each frame: more than half of the work.
    compressor = workspace.tool("compressor", _compressor)
    with compressor.stream_reader(plane.data, size=len(plane)) as reader:
        done: int = reader.readinto(target)
    return target[:done] if done < most_bytes else None


def _checked_planes(
    packed: memoryview, nbytes: int, start: int, element_bytes: int, where: str
) -> list[tuple[int, int, memoryview]]:
    def refuse(reason: str) -> NoReturn:
        raise DamagedFileError(
            f"{where}: a compressed chunk {reason}; the file is damaged, restore it from a copy "
            "or write it again"
        )

    head_bytes = _head_bytes(element_bytes)
    if len(packed) < head_bytes:
        refuse(f"has {len(packed)} bytes and its head alone takes {head_bytes}")
    written, begin, size, planes, zeros = _HEAD.unpack_from(packed)
    digest = xxhash.xxh3_64_intdigest(packed[_CHECKSUM_BYTES:])
    if digest != written:
        refuse(f"is not what was written (xxh3-64 {digest:016x}, written {written:016x})")
    if (begin, size) != (start, nbytes):
        refuse(
            f"says it holds {size} bytes from {begin} on, and {nbytes} from {start} on are expected"
        )
    if planes != element_bytes or any(zeros):
        refuse(f"has {planes} planes, and elements have {element_bytes} bytes")
    found, at = [], head_bytes
    count = nbytes // element_bytes
    for number in range(planes):
        kind, constant, zero, length = _PLANE.unpack_from(packed, _HEAD.size + number * _PLANE.size)
        possible = {RAW: length == count, PACKED: 0 < length < count, CONSTANT: length == 0}
        if not possible.get(kind, False) or zero or (constant and kind != CONSTANT):
            refuse(
                f"says that plane {number} of {count} bytes is of kind {kind} in {length} bytes "
                f"(byte {constant}, reserved {zero}), which cannot be"
            )
        found.append((kind, constant, packed[at : at + length]))
        at += length
    if at != len(packed):
        refuse(f"has {len(packed)} bytes, and its planes take {at}")
    return found


def _decode(
    frame: memoryview, plane: Bytes, decompressor: zstandard.ZstdDecompressor, where: str
) -> None:
    """Decode a frame that must be all of ``frame`` and fill ``plane``, straight into it."""
    try:
        says = zstandard.frame_content_size(frame)
        if says != len(plane):
            raise DamagedFileError(
                f"{where}: a compressed chunk says it holds {says} bytes and {len(plane)} are "
                "expected; the file is damaged, write it again"
            )
        if _frame_bytes(frame) != len(frame):
            raise zstandard.ZstdError("something is behind the frame, or it is cut off")
        # As the frame tells its size and is all there, nothing is buffered on the way.
        with decompressor.stream_reader(frame) as reader:
            done = reader.readinto(plane.data)
        if done != len(plane):
            raise zstandard.ZstdError(f"it holds {done} bytes rather than {len(plane)}")
    except zstandard.ZstdError as error:
        raise DamagedFileError(
            f"{where}: a compressed chunk cannot be decoded ({error}); "
            "the file is damaged, write it again"
        ) from error


def _frame_bytes(frame: memoryview) -> int:
    """Find where a frame ends: its blocks are a chain (RFC 8878, 3.1.1.2); -1 if it is cut off."""
    at: int = zstandard.frame_header_size(frame)
    checksum_bytes = 4 if zstandard.get_frame_parameters(frame).has_checksum else 0
    while at + 3 <= len(frame):
        block = int.from_bytes(frame[at : at + 3], "little")
        is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
        at += 3 + (1 if kind == 1 else size)
        if is_last:
            return at + checksum_bytes
    return -1
