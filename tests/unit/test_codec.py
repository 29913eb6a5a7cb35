"""Compression: lossless, chunk by chunk, and never believed without a check."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import noise

from diskoffload.errors import DamagedFileError, InvalidInputError
from diskoffload.store.codec import CHUNK_BYTES, Zstd, codec_named
from diskoffload.system.memory import tensor_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

ZSTD = codec_named("zstd")


def unpack(chunks: list[bytes], nbytes: int) -> bytes:
    target = memoryview(bytearray(nbytes))
    for number, chunk in enumerate(chunks):
        begin = number * CHUNK_BYTES
        ZSTD.unpack_into(chunk, target[begin : begin + CHUNK_BYTES], "file, tensor 'x'")
    return bytes(target)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_chunks_come_back_as_they_were(nbytes: int) -> None:
    data = bytes(range(256)) * (nbytes // 256 + 1)
    data = data[:nbytes]
    chunks = list(ZSTD.pack(memoryview(data)))
    assert len(chunks) == -(-nbytes // CHUNK_BYTES)
    assert sum(map(len, chunks)) < max(nbytes, 1) + 32
    assert unpack(chunks, nbytes) == data


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=2000))
def test_any_bytes_come_back(data: bytes) -> None:
    assert unpack(list(ZSTD.pack(memoryview(data))), len(data)) == data


def test_noise_grows_by_next_to_nothing() -> None:

    data = tensor_bytes(noise(torch.uint8, (100_000,)))
    (chunk,) = ZSTD.pack(data)
    assert len(chunk) < 100_000 + 64


PACKED = next(iter(ZSTD.pack(memoryview(b"disk offload " * 40))))
LENGTH = 13 * 40


@settings(deadline=None, max_examples=400)
@given(st.integers(0, len(PACKED) * 8 - 1))
def test_a_flipped_bit_is_never_believed(bit: int) -> None:
    flipped = bytearray(PACKED)
    flipped[bit // 8] ^= 1 << bit % 8
    target = bytearray(LENGTH)
    try:
        ZSTD.unpack_into(bytes(flipped), memoryview(target), "w")
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
            ZSTD.unpack_into(packed, memoryview(bytearray(LENGTH)), "some file")


@pytest.mark.parametrize("claimed", [LENGTH - 1, LENGTH + 1, 0])
def test_a_chunk_of_another_size_is_refused(claimed: int) -> None:
    target = bytearray(claimed)
    with pytest.raises(DamagedFileError, match=f"says it holds {LENGTH} bytes and {claimed} are"):
        ZSTD.unpack_into(PACKED, memoryview(target), "w")
    assert target == bytes(claimed)


def test_a_chunk_that_lies_about_its_size_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100 << 20))
    with pytest.raises(DamagedFileError):
        ZSTD.unpack_into(bomb, memoryview(bytearray(100)), "w")


def test_codecs_are_found_by_name() -> None:
    assert codec_named("zstd") == Zstd()
    assert ZSTD.name == "zstd"
    with pytest.raises(InvalidInputError, match="unknown compression 'lz4'; use None or one of"):
        codec_named("lz4")
    with pytest.raises(DamagedFileError, match=r"^f\.safetensors is compressed with the unknown"):
        codec_named("lz4", where="f.safetensors")
