"""Values at rest: mapped where the bytes are the value, loaded wherever they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shard_files import entry, file_bytes, frames_of, mappings_of, noise, open_shard, same

from diskoffload.errors import DamagedFileError
from diskoffload.store.codec import codec_named, element_bytes_of
from diskoffload.store.encoded import ENCODING_KEY, RAW, EncodedTensor, encoding_of
from diskoffload.store.packing import pack
from diskoffload.store.recipe import Piece
from diskoffload.store.shard import Shard
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.store.stored import (
    AssembledTensor,
    CastTensor,
    ShardTensor,
    Stored,
    StridedTensor,
    stored_tensors,
)
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

PLANES = codec_named("zstd")
FORMS = ["zstd", PLANES.name]
CHUNK_BYTES = 4 << 20


def stored(folder: Path, **tensors: torch.Tensor) -> dict[str, ShardTensor]:
    save_file(tensors, folder / "s.safetensors")
    found = stored_tensors(open_shard(folder / "s.safetensors"))
    return {name: one for name, one in found.items() if isinstance(one, ShardTensor)}


def packed_shard(path: Path, tensor: torch.Tensor, codec: str, damage: bool = False) -> Shard:
    """Write one tensor the way an offload folder keeps a packed one."""
    data = tensor_bytes(tensor)
    said: dict[str, object] = encoding_of(tensor.dtype, tuple(tensor.shape))
    chunks = [bytes(data)]
    if codec == "zstd":
        chunks = frames_of(data)
        said |= {"codec": codec, "chunks": [*map(len, chunks)]}
    elif codec == PLANES.name:
        packed_value = pack(data, element_bytes_of(tensor.dtype), PLANES) if len(data) else None
        chunks = [bytes(one) for one in packed_value.chunks] if packed_value else []
        said = encoding_of(tensor.dtype, tuple(tensor.shape), PLANES, [*map(len, chunks)])
    packed = b"".join(chunks)
    if damage:
        packed = packed[:-9] + bytes([packed[-9] ^ 1]) + packed[-8:]
    plan = [("x", torch.uint8, (len(packed),))]
    with ShardWriter(path, plan, Files(), {ENCODING_KEY: json.dumps({"x": said})}) as writer:
        writer.write("x", memoryview(packed))
        writer.publish(durable=False)
    return open_shard(path)


def test_a_plain_tensor_is_mapped_or_loaded(tmp_path: Path) -> None:
    value = noise(torch.float32, (3, 5))
    tensor = stored(tmp_path, x=value)["x"]
    mapped, loaded = tensor.mapped(), tensor.load()
    assert mapped is not None
    assert same(mapped, value)
    assert same(loaded, value)
    assert mapped.data_ptr() != loaded.data_ptr()
    mapped.zero_()
    assert same(tensor.load(), value)
    assert tensor.shards == (tensor.shard,)


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_one_misaligned_to_its_element_is_loaded_only(tmp_path: Path, gap: int) -> None:
    value = noise(torch.float32, (7,))
    data = bytes(gap) + bytes(tensor_bytes(value))
    header = json.dumps(
        {
            "gap": entry(shape=[gap], data_offsets=[0, gap]),
            "x": entry(dtype="F32", shape=[7], data_offsets=[gap, gap + 28]),
        }
    ).encode()
    (tmp_path / "s").write_bytes(file_bytes(header.ljust(-(-len(header) // 8) * 8), data))
    tensor = stored_tensors(open_shard(tmp_path / "s"))["x"]
    assert (tensor.mapped() is None) == (gap % 4 != 0)
    assert same(tensor.load(), value)


@pytest.mark.parametrize("shape", [(), (0,), (0, 1 << 40), (3, 0, 2)])
def test_scalars_and_empty_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    value = torch.empty(shape, dtype=torch.bfloat16)
    tensor = stored(tmp_path, x=value)["x"]
    assert tensor.shape == shape
    assert tensor.load().shape == torch.Size(shape)
    mapped = tensor.mapped()
    assert mapped is not None
    assert (mapped.shape, mapped.dtype) == (torch.Size(shape), torch.bfloat16)


def test_a_large_tensor_is_loaded_into_memory_of_its_own(tmp_path: Path) -> None:
    value = noise(torch.uint8, (300_000,))
    tensor = stored(tmp_path, x=value)["x"]
    assert same(tensor.load(), value)
    assert mappings_of(tmp_path / "s.safetensors") == 0


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", ["complex128", "complex32", "bits8", "float4_e2m1fn_x2"])
def test_a_dtype_that_the_format_lacks_is_mapped_as_it_is(tmp_path: Path, name: str) -> None:
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    value = noise(getattr(torch, name), (2, 3))
    tensor = stored_tensors(packed_shard(tmp_path / "s", value, RAW))["x"]
    assert isinstance(tensor, EncodedTensor)
    mapped = tensor.mapped()
    assert mapped is not None
    assert same(mapped, value)
    assert same(tensor.load(), value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 100, CHUNK_BYTES // 2, CHUNK_BYTES // 2 * 2 + 5])
def test_a_packed_tensor_is_decoded_chunk_by_chunk(tmp_path: Path, count: int, form: str) -> None:
    value = torch.arange(count, dtype=torch.int16).reshape(1, count)
    tensor = stored_tensors(packed_shard(tmp_path / "s", value, form))["x"]
    assert isinstance(tensor, EncodedTensor)
    chunk_bytes = CHUNK_BYTES if form == "zstd" else PLANES.chunk_bytes
    assert tensor.chunk_count == len(tensor.chunks) == -(-value.nbytes // chunk_bytes)
    assert (tensor.codec_name, tensor.compression) == (form, "zstd")
    assert tensor.mapped() is None
    assert same(tensor.load(), value)


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_in_a_packed_tensor_names_file_tensor_and_chunk(
    tmp_path: Path, form: str
) -> None:
    value = torch.arange(CHUNK_BYTES // 4 + 100, dtype=torch.int32)
    tensor = stored_tensors(packed_shard(tmp_path / "s", value, form, damage=True))["x"]
    last = 1 if form == "zstd" else 4
    with pytest.raises(DamagedFileError, match=rf"s, tensor 'x', chunk {last}: a compressed chunk"):
        tensor.load()


def test_a_cast_converts_into_fresh_memory(tmp_path: Path) -> None:
    value = torch.linspace(-3, 3, 50)
    inner = stored(tmp_path, x=value)["x"]
    cast = CastTensor(inner, torch.bfloat16)
    assert cast.mapped() is None
    assert same(cast.load(), value.to(torch.bfloat16))
    assert (cast.shape, cast.dtype, cast.shards) == ((50,), torch.bfloat16, inner.shards)


@pytest.mark.parametrize("strides", [(1, 4), (7, 2), (5, 1)])
def test_a_strided_tensor_has_its_strides_again(tmp_path: Path, strides: tuple[int, int]) -> None:
    value = noise(torch.float16, (4, 3))
    inner = stored(tmp_path, x=value)["x"]
    strided = StridedTensor(inner, strides)
    assert strided.mapped() is None
    loaded = strided.load()
    assert loaded.stride() == strides
    assert same(loaded, value)


def test_the_same_value_is_read_through_a_twin(tmp_path: Path) -> None:
    value = noise(torch.float32, (2, 2))
    plain = stored(tmp_path, x=value)["x"]
    packed = stored_tensors(packed_shard(tmp_path / "p", value, RAW))["x"]
    pieces = [(Piece("x", target=(0,)), plain), (Piece("x", target=(1,)), plain)]
    every: list[Stored] = [
        plain,
        packed,
        CastTensor(plain, torch.float64),
        StridedTensor(plain, (1, 2)),
        AssembledTensor(pieces, torch.float32, (2, 2, 2)),
    ]
    before = [one.load() for one in every]
    for one in (plain, packed):
        mapped = one.mapped()
        assert mapped is not None
        mapped.fill_(3)  # an edit in place: a twin must not see it
    for one, wanted in zip(every, before, strict=True):
        twins: dict[Shard, Shard] = {}
        twin = one.over(lambda shard, twins=twins: twins.setdefault(shard, shard.twin()))  # type: ignore[misc]
        assert [shard.owner for shard in twin.shards] == list(one.shards)
        assert same(twin.load(), wanted)


# ------------------------------------------------------------------------- assembled


def test_pieces_are_stacked_concatenated_and_transposed(tmp_path: Path) -> None:
    parts = {name: noise(torch.float32, (2, 3), seed) for seed, name in enumerate("abcd")}
    source = stored(tmp_path, **parts)
    pieces = [
        Piece("a", target=(0, slice(0, 2))),
        Piece("b", target=(0, slice(2, 4))),
        Piece("c", target=(1, slice(0, 2))),
        Piece("d", target=(1, slice(2, 3)), region=(slice(1, 2),)),
        Piece("d", target=(1, 3), region=(0,)),
    ]
    whole = AssembledTensor([(one, source[one.source]) for one in pieces], torch.float32, (2, 4, 3))
    d = parts["d"]
    wanted = torch.stack(
        [torch.cat([parts["a"], parts["b"]]), torch.cat([parts["c"], d[1:2], d[0:1]])]
    )
    assert whole.mapped() is None
    assert same(whole.load(), wanted)
    assert len(whole.shards) == 1


def test_a_transposed_piece(tmp_path: Path) -> None:
    value = noise(torch.bfloat16, (3, 2, 5))
    source = stored(tmp_path, x=value)["x"]
    piece = Piece("x", permutation=(2, 0, 1))
    made = AssembledTensor([(piece, source)], torch.bfloat16, (5, 3, 2)).load()
    assert made.is_contiguous()
    assert same(made, value.permute(2, 0, 1))


def test_a_piece_that_cannot_be_mapped_is_loaded_and_converted(tmp_path: Path) -> None:
    value = noise(torch.float16, (4,)).nan_to_num()
    data = b"?" + bytes(tensor_bytes(value))
    header = json.dumps(
        {
            "gap": entry(shape=[1], data_offsets=[0, 1]),
            "x": entry(dtype="F16", data_offsets=[1, 9]),
        }
    ).encode()
    (tmp_path / "s").write_bytes(file_bytes(header.ljust(-(-len(header) // 8) * 8), data))
    source = stored_tensors(open_shard(tmp_path / "s"))["x"]
    assert isinstance(source, ShardTensor)
    assert source.mapped() is None
    made = AssembledTensor([(Piece("x", target=(slice(0, 4),)), source)], torch.float32, (4,))
    assert same(made.load(), value.to(torch.float32))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_tiling_gives_the_tensor_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    value = torch.arange(rows * columns).reshape(rows, columns)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    flips = data.draw(st.lists(st.booleans(), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    tensors, pieces = {}, []
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, rows], strict=True)):
        part = value[start:stop]
        flip = flips[number]
        tensors[f"p{number}"] = (part.t() if flip else part).contiguous()
        permutation = (1, 0) if flip else None
        pieces.append(Piece(f"p{number}", (slice(start, stop),), (), permutation))
    source = stored(tmp_path_factory.mktemp("tiles"), **tensors)
    made = AssembledTensor(
        [(one, source[one.source]) for one in pieces], value.dtype, (rows, columns)
    )
    assert same(made.load(), value)
    for piece in pieces:  # and backwards, as saving reads it
        part = made.load()[piece.target]
        back = part.t() if piece.permutation else part
        assert same(back, tensors[piece.source])
