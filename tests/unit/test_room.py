"""Memory of packed chunks is used again, and never while a chunk is still somebody's."""

import numpy as np
import torch

from diskoffload.store.buffers import Buffers
from diskoffload.store.codec import codec_named
from diskoffload.store.packing import pack
from diskoffload.store.room import Room
from diskoffload.system.memory import tensor_bytes

_MIB = 1 << 20


def _weights(seed: int) -> memoryview:
    generator = torch.Generator().manual_seed(seed)
    return tensor_bytes(torch.randn(4 * _MIB, generator=generator).bfloat16())


def test_the_next_value_is_packed_into_the_same_memory() -> None:
    spare, codec = Buffers(), codec_named("zstd")
    places = []
    for seed in range(3):
        packed = pack(_weights(seed), 2, codec, spare)
        assert packed is not None
        chunks = (np.frombuffer(chunk, np.uint8) for chunk in packed.chunks)
        places.append(min(chunk.ctypes.data for chunk in chunks))
        del chunks
        packed.release()
        assert packed.chunks == []
        assert spare.free_bytes >= _MIB
    assert len(set(places)) == 1


def test_a_chunk_that_somebody_has_stays_what_it_is() -> None:
    spare, codec = Buffers(), codec_named("zstd")
    first = pack(_weights(0), 2, codec, spare)
    assert first is not None
    kept = first.chunks[0]
    value = bytes(kept)
    first.release()
    second = pack(_weights(1), 2, codec, spare)
    assert second is not None
    assert kept == value


def test_little_waits_after_a_large_value() -> None:
    spare = Buffers()
    data = memoryview(bytearray(128 * _MIB))
    view = np.frombuffer(data, np.uint8)
    view[1::2] = np.tile(np.arange(16, dtype=np.uint8), len(view) // 32)
    view[::2] = np.random.default_rng(0).integers(0, 256, len(view) // 2, np.uint8)
    packed = pack(data, 2, codec_named("zstd"), spare)
    assert packed is not None
    assert packed.nbytes > 48 * _MIB
    packed.release()
    assert 0 < spare.free_bytes <= 32 * _MIB


def test_what_is_full_takes_nothing_more() -> None:
    room = Room(3 * _MIB, Buffers())
    part = memoryview(bytes(2 * _MIB))
    assert room.put([part[:_MIB], part[_MIB:]]) == part
    assert not room.is_exceeded
    assert room.put([part]) == b""
    assert room.is_exceeded
