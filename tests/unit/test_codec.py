"""Codecs are found by name; the form that earlier versions wrote is read, and never believed."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import FRAME_CHUNK_BYTES, frames_of

from diskoffload.errors import DamagedFileError, InvalidInputError
from diskoffload.store.codec import can_hold, codec_named, codec_of_form, element_bytes_of
from diskoffload.store.workspace import Workspace
from diskoffload.store.zstd_frames import Zstd
from diskoffload.store.zstd_planes import ZstdPlanes

pytestmark = pytest.mark.usefixtures("no_leaks")

ZSTD = Zstd()


def unpack_into(packed: bytes, target: bytearray | memoryview, where: str) -> None:
    ZSTD.unpack_chunk(memoryview(packed), memoryview(target), 0, 1, Workspace(), where)


def unpack(chunks: list[bytes], nbytes: int) -> bytes:
    target = memoryview(bytearray(nbytes))
    for number, chunk in enumerate(chunks):
        begin = number * FRAME_CHUNK_BYTES
        unpack_into(chunk, target[begin : begin + FRAME_CHUNK_BYTES], "file, tensor 'x'")
    return bytes(target)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, FRAME_CHUNK_BYTES, FRAME_CHUNK_BYTES + 1])
def test_chunks_come_back_as_they_were(nbytes: int) -> None:
    data = (bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]
    chunks = frames_of(data)
    assert can_hold(ZSTD, [*map(len, chunks)], nbytes, 1)
    assert unpack(chunks, nbytes) == data


PACKED = frames_of(b"disk offload " * 40)[0]
LENGTH = 13 * 40


@settings(deadline=None, max_examples=400)
@given(st.integers(0, len(PACKED) * 8 - 1))
def test_a_flipped_bit_is_never_believed(bit: int) -> None:
    flipped = bytearray(PACKED)
    flipped[bit // 8] ^= 1 << bit % 8
    target = bytearray(LENGTH)
    try:
        unpack_into(bytes(flipped), target, "w")
    except DamagedFileError:
        return
    assert target == b"disk offload " * 40  # the bit meant nothing


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.integers(0, len(PACKED)))
def test_garbage_is_refused_by_name(garbage: bytes, cut: int) -> None:
    for packed in (garbage, PACKED[:cut] + garbage):
        if packed.startswith(PACKED):
            continue
        with pytest.raises(DamagedFileError, match=r"^some file: a compressed chunk"):
            unpack_into(packed, bytearray(LENGTH), "some file")


@pytest.mark.parametrize("claimed", [LENGTH - 1, LENGTH + 1, 0])
def test_a_chunk_of_another_size_is_refused(claimed: int) -> None:
    target = bytearray(claimed)
    with pytest.raises(DamagedFileError, match=f"says it holds {LENGTH} bytes and {claimed} are"):
        unpack_into(PACKED, target, "w")
    assert target == bytes(claimed)


def test_a_chunk_that_lies_about_its_size_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100 << 20))
    with pytest.raises(DamagedFileError):
        unpack_into(bomb, bytearray(100), "w")


# ------------------------------------------------------------------------- by name


def test_a_user_names_what_is_written_and_a_file_what_is_read() -> None:
    assert codec_named("zstd") == ZstdPlanes()
    assert codec_of_form("zstd", 1, "f") == ZSTD
    assert codec_of_form("zstd-planes", 1, "f") == codec_named("zstd")
    for unknown in ("lz4", "zstd-planes", ""):
        with pytest.raises(InvalidInputError, match=f"unknown compression '{unknown}'; use None"):
            codec_named(unknown)


def test_what_a_file_names_and_nobody_knows_is_refused_by_its_name() -> None:
    with pytest.raises(DamagedFileError, match=r"^f\.safetensors is compressed with the unknown"):
        codec_of_form("lz4", 1, "f.safetensors")
    with pytest.raises(DamagedFileError, match="version 2 of the codec 'zstd-planes', and up to"):
        codec_of_form("zstd-planes", 2, "f.safetensors")
    with pytest.raises(DamagedFileError, match="version 0 of the codec 'zstd'"):
        codec_of_form("zstd", 0, "f.safetensors")


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        *((torch.int8, 1), (torch.bool, 1), (torch.float8_e4m3fn, 1), (torch.bfloat16, 2)),
        *((torch.complex64, 4), (torch.float32, 4), (torch.int64, 8), (torch.complex128, 8)),
    ],
)
def test_the_parts_of_a_complex_number_are_split_apart(dtype: torch.dtype, nbytes: int) -> None:
    assert element_bytes_of(dtype) == nbytes
