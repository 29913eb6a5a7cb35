"""The chunks that are written: bit-exact for every kind of value, bounded, and checked."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import STORABLE, noise, same
from writer_bench import Bench

from diskoffload.errors import DamagedFileError
from diskoffload.store.codec import can_hold, codec_named, element_bytes_of
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.packing import Packed, pack
from diskoffload.store.stored import ShardTensor
from diskoffload.store.workspace import Workspace
from diskoffload.system.memory import tensor_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

PLANES = codec_named("zstd")
CHUNK_BYTES = PLANES.chunk_bytes
# Types that the format lacks, and that are stored under a name of ours.
DTYPES = [*STORABLE, torch.complex128, torch.complex32, torch.bits8, torch.bits16]


def packed(tensor: torch.Tensor) -> Packed | None:
    return pack(tensor_bytes(tensor), element_bytes_of(tensor.dtype), PLANES)


def ratio(tensor: torch.Tensor) -> float:
    found = packed(tensor)
    return 1.0 if found is None else found.nbytes / tensor.nbytes


def chunk_of(data: bytes, start: int, element_bytes: int) -> bytes:
    return b"".join(PLANES.pack_chunk(memoryview(data), start, element_bytes, Workspace()))


def sizes(data: bytes, element_bytes: int) -> tuple[bytes, list[int]]:
    """Pack one chunk; give it, and how many bytes each of its planes takes."""
    chunk = chunk_of(data, 0, element_bytes)
    entries = np.frombuffer(chunk, "<u4", 2 * element_bytes, 24)
    return chunk, entries[1::2].tolist()


def kept(bench: Bench, value: torch.Tensor) -> EncodedTensor | ShardTensor:
    ticket = bench.put(value, "zstd")
    bench.writer.flush()
    assert isinstance(ticket.stored, EncodedTensor | ShardTensor)
    return ticket.stored


# ------------------------------------------------------------------------- every bit


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 999, CHUNK_BYTES // 4 + 3])
def test_every_bit_of_every_dtype_comes_back(bench: Bench, dtype: torch.dtype, count: int) -> None:
    """Half of the elements are zero, so that it is packed, and half are of any bits."""
    value = noise(dtype, (2 * count,))
    tensor_bytes(value)[: count * dtype.itemsize] = bytes(count * dtype.itemsize)
    stored = kept(bench, value)
    is_packed = isinstance(stored, EncodedTensor) and stored.compression is not None
    assert is_packed == (count > 100)
    assert same(stored.load(), value)
    assert same(stored.load_rows(count - 1, count + 1), value[count - 1 : count + 1])


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_nothing_and_one_element_are_stored_as_they_are(
    bench: Bench, shape: tuple[int, ...]
) -> None:
    value = noise(torch.bfloat16, shape)
    stored = kept(bench, value)
    assert isinstance(stored, ShardTensor)
    assert same(stored.load(), value)


def test_odd_numbers_come_back(bench: Bench) -> None:
    """NaNs with any payload, negative zero, infinities and numbers below the normal ones."""
    odd = [0x7FC0, 0xFFC1, 0x7F81, 0xFFFF, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80]
    bits = torch.tensor(odd * 3001, dtype=torch.int32).to(torch.uint16)
    for value in (bits.view(torch.bfloat16), (bits.to(torch.int32) << 16).view(torch.float32)):
        stored = kept(bench, value)
        assert isinstance(stored, EncodedTensor)
        assert same(stored.load(), value)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([1, 2, 4, 8]), st.binary(max_size=300), st.integers(1, 400))
def test_any_bytes_come_back(element_bytes: int, unit: bytes, times: int) -> None:
    data = (unit * times)[: len(unit) * times // element_bytes * element_bytes]
    if not data:
        return
    chunk = chunk_of(data, 8, element_bytes)
    least, most = PLANES.packed_range_bytes(len(data), element_bytes)
    assert least <= len(chunk) <= most
    target = memoryview(bytearray(len(data)))
    PLANES.unpack_chunk(memoryview(chunk), target, 8, element_bytes, Workspace(), "w")
    assert target == data


# ------------------------------------------------------------------------- what pays


def test_only_planes_that_pay_are_packed() -> None:
    numbers = torch.Generator().manual_seed(0)
    weights = torch.randn(CHUNK_BYTES // 4, generator=numbers) * 0.02
    count = CHUNK_BYTES // 4
    _, found = sizes(bytes(tensor_bytes(weights)), 4)
    assert found[:3] == [count, count, count]  # raw
    assert 0.3 * count < found[3] < 0.4 * count
    of_bfloat16 = weights.to(torch.bfloat16).float()
    _, found = sizes(bytes(tensor_bytes(of_bfloat16)), 4)
    assert found[:3] == [0, 0, count]  # constant, constant, raw


def test_constant_chunks_take_their_head_alone() -> None:
    for element_bytes, value in ((1, b"a"), (2, b"ab"), (4, b"abcd"), (8, b"abcdefgh")):
        chunk, found = sizes(value * (CHUNK_BYTES // element_bytes), element_bytes)
        assert found == [0] * element_bytes
        assert len(chunk) == PLANES.packed_range_bytes(CHUNK_BYTES, element_bytes)[0]


WEIGHTS = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1)) * 0.02
INT4 = torch.randint(-8, 8, (1_000_000,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("value", "most"),
    [
        pytest.param(WEIGHTS, 0.84, id="fp32"),
        pytest.param(WEIGHTS.to(torch.bfloat16), 0.68, id="bf16"),
        # Eleven of sixteen bits are noise, and of an exponent that is normally distributed 2.6
        # bits remain: 0.85 is what any code of single numbers can reach.
        pytest.param(WEIGHTS.to(torch.float16), 0.855, id="fp16"),
        pytest.param(WEIGHTS.to(torch.bfloat16).float(), 0.34, id="fp32 that holds bf16"),
        pytest.param(WEIGHTS.to(torch.float16).float(), 0.44, id="fp32 that holds fp16"),
        pytest.param(WEIGHTS.double(), 0.44, id="fp64 that holds fp32"),
        pytest.param((WEIGHTS * 500).to(torch.int8), 0.68, id="int8"),
        pytest.param((WEIGHTS * 20).to(torch.float8_e4m3fn), 0.82, id="fp8"),
        pytest.param(INT4.to(torch.int8), 0.55, id="int4 in bytes"),
        pytest.param(torch.complex(WEIGHTS, WEIGHTS), 0.84, id="complex64"),
        pytest.param(torch.arange(1_000_000), 0.3, id="positions"),
        pytest.param(WEIGHTS > 0.03, 0.2, id="mask"),
        pytest.param(torch.full((3_000_001,), 1.5), 0.0001, id="constant"),
    ],
)
def test_ratios(bench: Bench, value: torch.Tensor, most: float) -> None:
    assert ratio(value) <= most
    assert same(kept(bench, value).load(), value)


def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many bytes are packed at each call."""
    seen: list[int] = []
    real = type(PLANES).pack_chunk

    def noting(self: object, data: memoryview, *rest: object) -> list[memoryview]:
        seen.append(len(data))
        return real(self, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(type(PLANES), "pack_chunk", noting)
    return seen


def test_what_does_not_pay_is_found_by_a_sample_and_stays_mappable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = noise(torch.uint8, (20 << 20,))
    seen = packings(monkeypatch)
    stored = kept(bench, value)
    assert isinstance(stored, ShardTensor)
    assert stored.mapped() is not None
    assert sum(seen) < value.nbytes / 50


def test_what_only_the_sample_likes_is_stored_as_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = noise(torch.uint8, (8 << 20,))
    step = (len(value) - (32 << 10)) // 7
    for number in range(8):
        value[number * step : number * step + (32 << 10)] = 0
    seen = packings(monkeypatch)
    stored = kept(bench, value)
    assert isinstance(stored, ShardTensor)
    assert same(stored.load(), value)
    assert sum(seen) > value.nbytes  # the sample, and all of it


def test_small_tensors_are_packed_without_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = packings(monkeypatch)
    assert packed(torch.zeros(1000)) is not None
    assert seen == [4000]


# ------------------------------------------------------------------------- chunks


def test_chunks_are_decoded_by_any_number_of_threads(bench: Bench) -> None:
    value = WEIGHTS.to(torch.bfloat16).repeat(3)[:2_900_001]
    stored = kept(bench, value)
    assert isinstance(stored, EncodedTensor)
    assert stored.chunk_count == 6
    raw = stored.shard.path.read_bytes()
    target = bytearray(value.nbytes)
    chunks = [stored.chunk(number) for number in range(stored.chunk_count)]
    assert [one.start for one in chunks] == [number * CHUNK_BYTES for number in range(6)]
    assert sum(one.nbytes for one in chunks) == stored.nbytes == value.nbytes
    assert chunks[0].offset == stored.spec.offset
    assert chunks[-1].offset + chunks[-1].packed_bytes == stored.spec.offset + stored.spec.nbytes
    errors: list[BaseException] = []

    def unpack(number: int) -> None:
        try:
            one = chunks[number]
            read = memoryview(raw)[one.offset : one.offset + one.packed_bytes]
            stored.unpack_chunk(number, read, memoryview(target)[one.start :][: one.nbytes])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=unpack, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert target == tensor_bytes(value)


def test_a_flipped_bit_of_a_chunk_is_refused() -> None:
    value = bytes(tensor_bytes(WEIGHTS.to(torch.bfloat16)[:500]))
    chunk = memoryview(bytearray(chunk_of(value, 0, 2)))
    target, workspace = memoryview(bytearray(len(value))), Workspace()
    for bit in range(8 * len(chunk)):
        chunk[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedFileError, match=r"^w: a compressed chunk is not what was"):
            PLANES.unpack_chunk(chunk, target, 0, 2, workspace, "w")
        chunk[bit // 8] ^= 1 << bit % 8
    PLANES.unpack_chunk(chunk, target, 0, 2, workspace, "w")
    assert target == value


def test_a_chunk_in_the_place_of_another_is_refused() -> None:
    value = bytes(4000)
    chunk = chunk_of(value, 0, 2)
    target = memoryview(bytearray(len(value)))
    PLANES.unpack_chunk(memoryview(chunk), target, 0, 2, Workspace(), "w")
    for start, element_bytes, nbytes in ((CHUNK_BYTES, 2, 4000), (0, 4, 4000), (0, 2, 3998)):
        with pytest.raises(DamagedFileError, match=r"^w: a compressed chunk"):
            PLANES.unpack_chunk(
                memoryview(chunk), target[:nbytes], start, element_bytes, Workspace(), "w"
            )


@pytest.mark.parametrize("element_bytes", [1, 2, 4, 8])
def test_what_chunks_can_hold_is_known_beforehand(element_bytes: int) -> None:
    head = 24 + 8 * element_bytes
    for nbytes in (CHUNK_BYTES, CHUNK_BYTES + 8):
        rest = [head] if nbytes > CHUNK_BYTES else []
        for size, possible in (
            *((head, True), (head - 1, False)),
            *((CHUNK_BYTES + head, True), (CHUNK_BYTES + head + 1, False)),
        ):
            assert can_hold(PLANES, [size, *rest], nbytes, element_bytes) == possible
    assert not can_hold(PLANES, [head], 2 * CHUNK_BYTES, element_bytes)
    assert not can_hold(PLANES, [head] * 2, CHUNK_BYTES, element_bytes)
    assert can_hold(PLANES, [], 0, element_bytes)


def test_a_whole_tensor_is_decoded_into_one_memory(bench: Bench) -> None:
    """Beside the value there is what each thread works with, whatever the tensor's size."""
    value = WEIGHTS.to(torch.bfloat16).repeat(8)
    stored = kept(bench, value)
    taken: list[int] = []
    real = Workspace.buffer

    def noting(self: Workspace, use: object, nbytes: int) -> object:
        taken.append(nbytes)
        return real(self, use, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "buffer", noting)
        assert same(stored.load(), value)
    assert max(taken) <= CHUNK_BYTES
