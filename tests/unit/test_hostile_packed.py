"""What a file says of its packed tensors is not believed either."""

from __future__ import annotations

import json
import re
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shard_files import FRAME_CHUNK_BYTES as CHUNK_BYTES
from shard_files import entry, file_bytes, in_child, open_shard

from diskoffload.errors import DamagedFileError
from diskoffload.store.encoded import ENCODING_KEY
from diskoffload.store.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("no_leaks")


MIB = 1 << 20
numbers = st.integers(-2, 10) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64])
scalars = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


def packed(text: str | None, nbytes: int = 4) -> bytes:
    header = {"a": entry(shape=[nbytes], data_offsets=[0, nbytes])}
    metadata = {} if text is None else {"__metadata__": {ENCODING_KEY: text}}
    return file_bytes({**metadata, **header}, bytes(nbytes))


def described(**changes: Any) -> str:
    return json.dumps({"a": {"codec": "raw", "dtype": "complex32", "shape": [1], **changes}})


DECEITS = {
    "not JSON": "{",
    "deep JSON": "[" * 100_000,
    "not a table": "[]",
    "tensor is text": '{"a":"raw"}',
    "tensor is null": '{"a":null}',
    "nothing said": '{"a":{}}',
    "unknown codec": described(codec="lzma", chunks=[4]),
    "codec is a list": described(codec=[]),
    "unknown dtype": described(dtype="float3"),
    "dtype is a function": described(dtype="add"),
    "dtype is null": described(dtype=None),
    "quantized, so more than its bytes": described(dtype="qint8", shape=[4]),
    "quantized below a byte": described(dtype="quint2x4", shape=[4]),
    "shape too large": described(shape=[2]),
    "shape too small": described(shape=[0]),
    "negative sizes": described(shape=[-1, -1]),
    "infinite size": '{"a":{"codec":"raw","dtype":"complex32","shape":[Infinity]}}',
    "size of no number": '{"a":{"codec":"raw","dtype":"complex32","shape":[NaN]}}',
    "a fraction of a size": described(shape=[1.5]),
    "sizes as text": described(shape="1"),
    "no shape at all": described(shape=None),
    "number of 5,000 digits": '{"a":{"codec":"raw","dtype":"complex32","shape":['
    + "9" * 5000
    + "]}}",
    "chunks too long": described(codec="zstd", chunks=[5]),
    "chunks too short": described(codec="zstd", chunks=[3]),
    "negative chunk": described(codec="zstd", chunks=[8, -4]),
    "chunks are a number": described(codec="zstd", chunks=4),
    "infinite chunk": '{"a":{"codec":"zstd","dtype":"int8","shape":[9],"chunks":[Infinity]}}',
    "too many chunks": described(codec="zstd", chunks=[2, 2]),
    "too few chunks": described(codec="zstd", shape=[1 << 40], chunks=[4]),
    "chunks of no bytes": described(codec="zstd", shape=[3 * CHUNK_BYTES], chunks=[0] * 11 + [4]),
    "a whole chunk from 4 bytes": described(codec="zstd", shape=[CHUNK_BYTES // 4], chunks=[4]),
    "a version that is none": described(codec="zstd-planes", version="1", chunks=[4]),
    "version 0": described(codec="zstd-planes", version=0, chunks=[4]),
    "a version of a bool": described(codec="zstd-planes", version=True, chunks=[4]),
    "a newer version": described(codec="zstd-planes", version=2, chunks=[4]),
    "a newer version of raw": described(version=2),
    "planes in less than a head": described(codec="zstd-planes", chunks=[4]),
    "a whole chunk of planes from 4 bytes": described(
        codec="zstd-planes", shape=[MIB // 4], chunks=[4]
    ),
    "too few chunks of planes": described(codec="zstd-planes", shape=[1 << 40], chunks=[4]),
    "chunks are a text": described(codec="raw", chunks=""),
    "sizes are a table": described(shape={}),
    "65 dimensions": described(shape=[1] * 65),
    "a size twice": '{"a":{"codec":"raw","dtype":"int8","shape":[5],"shape":[4]}}',
    "tensor twice": '{"a":{},' + described()[1:],
    "dtype is a list": described(dtype=[]),
    "dtype is a private name": described(dtype="__builtins__"),
}


@pytest.mark.parametrize("deceit", DECEITS)
def test_a_false_description_of_packed_tensors_is_refused(tmp_path: Path, deceit: str) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packed(DECEITS[deceit]))
    shard = open_shard(path)
    with pytest.raises(DamagedFileError) as caught:
        stored_tensors(shard)
    assert str(path) in str(caught.value)


def test_no_elements_and_overflowing_sizes_in_a_description(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packed(described(shape=[1 << 62, 4, 0]), nbytes=0))
    with pytest.raises(DamagedFileError, match=re.escape(str(path))):
        stored_tensors(open_shard(path))


def test_a_description_of_a_tensor_that_is_not_there_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packed('{"b":{"codec":"raw","dtype":"complex32","shape":[1]}}'))
    (tensor,) = stored_tensors(open_shard(path)).values()
    assert tensor.load().tolist() == [0, 0, 0, 0]


def test_a_dtype_that_is_a_module_is_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(packed(described(dtype="onnx")))

    def work() -> list[str]:
        before = {*sys.modules}
        with pytest.raises(DamagedFileError, match="unknown dtype 'onnx'"):
            stored_tensors(open_shard(path))
        return sorted({*sys.modules} - before)

    for name in [one for one in sys.modules if one.startswith("torch.onnx")]:
        del sys.modules[name]
    assert in_child(work) == []


def compressed(
    claimed_bytes: int, chunks: list[bytes], codec: str = "zstd", dtype: str = "uint8"
) -> bytes:
    """Put a file together whose tensor is said to be in these chunks."""
    shape = [claimed_bytes // getattr(torch, dtype).itemsize]
    text = described(codec=codec, dtype=dtype, shape=shape, chunks=[*map(len, chunks)])
    data = b"".join(chunks)
    header = {
        "__metadata__": {ENCODING_KEY: text},
        "a": entry(shape=[len(data)], data_offsets=[0, len(data)]),
    }
    return file_bytes(header, data)


def frame(content: bytes, *, says_size: bool = True) -> bytes:
    made: bytes = zstandard.ZstdCompressor(write_content_size=says_size).compress(content)
    return made


SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
RAW_BLOCKS = b"\x28\xb5\x2f\xfd\x60" + (1000 - 256).to_bytes(2, "little")
CHUNKS: dict[str, tuple[int, list[bytes]]] = {
    "says one size and holds another": (1000, [frame(bytes(999))]),
    "says a size and holds less": (1000, [RAW_BLOCKS + b"\x21\0\0" + b"1234"]),
    "says a size and holds more": (1000, [RAW_BLOCKS + b"\x03\xfa\0" + b"1" * 99]),
    "says no size": (1000, [frame(bytes(1000), says_size=False)]),
    "a bomb": (1000, [frame(bytes(100 << 20))]),
    "a bomb that says no size": (1000, [frame(bytes(10 << 20), says_size=False)]),
    "something behind the frame": (1000, [frame(bytes(1000)) + b"1234"]),
    "two frames": (1000, [frame(bytes(500)) + frame(bytes(500))]),
    "a frame that is skipped": (1000, [SKIPPED + frame(bytes(1000))]),
    "cut off": (1000, [frame(bytes(range(250)) * 4)[:-8]]),
    "no frame": (1000, [b"1" * 1000]),
    "the second is the first one's": (
        CHUNK_BYTES + 8,
        [frame(bytes(CHUNK_BYTES)), frame(bytes(9))],
    ),
    "in the wrong order": (CHUNK_BYTES + 8, [frame(bytes(8)), frame(bytes(CHUNK_BYTES))]),
    "much longer than what it holds": (1000, [frame(bytes(1000)) + bytes(2000)]),
    "a window of gigabytes": (1000, [b"\x28\xb5\x2f\xfd\x80\xa8" + (1000).to_bytes(4, "little")]),
}


@pytest.mark.parametrize("lie", CHUNKS)
def test_a_chunk_that_lies_is_refused_with_little_memory(tmp_path: Path, lie: str) -> None:
    check_refused(tmp_path, compressed(*CHUNKS[lie]), 2 * CHUNK_BYTES)


def check_refused(tmp_path: Path, content: bytes, most_bytes: int) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(content)

    def work() -> list[object]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DamagedFileError) as caught:
            stored_tensors(open_shard(path))["a"].load()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return [grown * 1024, str(caught.value)]

    found = in_child(work)
    assert isinstance(found, list), found
    assert str(path) in found[1]
    assert "tensor 'a'" in found[1]
    assert found[0] < most_bytes + (8 << 20)


RAW, PACKED, CONSTANT = 0, 1, 2
Plane = tuple[int, int, bytes] | tuple[int, int, bytes, int] | tuple[int, int, bytes, int, int]


def chunk_of(
    *planes: Plane, start: int = 0, nbytes: int = 2000, size: int = 2, zeros: bytes = bytes(3)
) -> bytes:
    """Put a chunk together, with its right checksum.

    A plane is its kind, its constant, its bytes, and perhaps another length and a reserved number.
    """
    head = struct.pack("<QIB3s", start, nbytes, size, zeros)
    for kind, constant, content, *rest in planes:
        length, reserved = [*rest, 0, 0][:2] if rest else (len(content), 0)
        head += struct.pack("<BBHI", kind, constant, reserved, length)
    rest_bytes = head + b"".join(plane[2] for plane in planes)
    return xxhash.xxh3_64_intdigest(rest_bytes).to_bytes(8, "little") + rest_bytes


NOISE, ZERO = (RAW, 0, bytes(range(250)) * 4), (CONSTANT, 0, b"")
HONEST = frame(bytes(1000))
PLANES: dict[str, list[bytes]] = {
    "less planes than an element has bytes": [chunk_of(NOISE, size=1)],
    "more planes than an element has bytes": [chunk_of(ZERO, ZERO, ZERO, ZERO, size=4)],
    "no plane": [chunk_of(ZERO, ZERO, size=0)],
    "255 planes": [chunk_of(ZERO, ZERO, size=255)],
    "a head of others": [chunk_of(ZERO, ZERO, zeros=b"\0\1\0")],
    "a chunk of another size": [chunk_of(ZERO, ZERO, nbytes=1998)],
    "a chunk of no size": [chunk_of(ZERO, ZERO, nbytes=0)],
    "a chunk of 4 GiB": [chunk_of(ZERO, ZERO, nbytes=(1 << 32) - 2)],
    "a chunk from elsewhere": [chunk_of(ZERO, ZERO, start=MIB)],
    "a kind that there is not": [chunk_of((3, 0, b""), ZERO)],
    "a kind of 255": [chunk_of(ZERO, (255, 0, b""))],
    "a raw plane that is short": [chunk_of(ZERO, (RAW, 0, bytes(999)))],
    "a raw plane that is long": [chunk_of(ZERO, (RAW, 0, bytes(1001)))],
    "a raw plane that is not there": [chunk_of(ZERO, (RAW, 0, b"", 1000))],
    "a raw plane with a constant": [chunk_of(ZERO, (RAW, 7, bytes(1000)))],
    "a constant of several bytes": [chunk_of(ZERO, (CONSTANT, 0, b"ab"))],
    "a packed plane with a constant": [chunk_of(ZERO, (PACKED, 1, HONEST))],
    "a packed plane of nothing": [chunk_of(ZERO, (PACKED, 0, b""))],
    "a packed plane that did not shrink": [
        chunk_of(ZERO, (PACKED, 0, RAW_BLOCKS + b"\x41\x1f\0" + bytes(1000)))
    ],
    "a reserved number": [chunk_of(ZERO, (CONSTANT, 0, b"", 0, 1))],
    "a plane beyond the chunk": [chunk_of(ZERO, (PACKED, 0, HONEST, len(HONEST) + 1))],
    "planes that share bytes": [chunk_of((PACKED, 0, HONEST), (PACKED, 0, b"", len(HONEST)))],
    "bytes that no plane has": [chunk_of(ZERO, (PACKED, 0, HONEST, len(HONEST) - 1))],
    "something behind the planes": [chunk_of(ZERO, (CONSTANT, 0, b"1", 0))],
    "a plane that holds more": [chunk_of(ZERO, (PACKED, 0, frame(bytes(1001))))],
    "a plane that holds less": [chunk_of(ZERO, (PACKED, 0, frame(bytes(999))))],
    "a plane that says no size": [chunk_of(ZERO, (PACKED, 0, frame(bytes(1000), says_size=False)))],
    "a plane that says a size and holds less": [
        chunk_of(ZERO, (PACKED, 0, RAW_BLOCKS + b"\x21\0\0" + b"1234"))
    ],
    "a plane that says a size and holds more": [
        chunk_of(ZERO, (PACKED, 0, RAW_BLOCKS + b"\x4b\x1f\0" + b"1"))
    ],
    "a plane that is a bomb": [chunk_of(ZERO, (PACKED, 0, frame(bytes(2 << 20))))],
    "a plane that is a bomb and says no size": [
        chunk_of(ZERO, (PACKED, 0, frame(bytes(2 << 20), says_size=False)))
    ],
    "a plane with something behind its frame": [chunk_of(ZERO, (PACKED, 0, HONEST + b"1234"))],
    "a plane of two frames": [chunk_of(ZERO, (PACKED, 0, frame(bytes(500)) * 2))],
    "a plane whose second frame is empty": [chunk_of(ZERO, (PACKED, 0, HONEST + frame(b"")))],
    "a plane whose first frame is skipped": [chunk_of(ZERO, (PACKED, 0, SKIPPED + HONEST))],
    "a plane that is cut off": [chunk_of(ZERO, (PACKED, 0, frame(b"ab" * 500)[:-3]))],
    "a plane that is no frame": [chunk_of(ZERO, (PACKED, 0, b"1" * 900))],
    "a plane with a window of gigabytes": [
        chunk_of(ZERO, (PACKED, 0, b"\x28\xb5\x2f\xfd\x80\xa8" + (1000).to_bytes(4, "little")))
    ],
    "a plane that wants a dictionary": [
        chunk_of(ZERO, (PACKED, 0, b"\x28\xb5\x2f\xfd\x61\x07" + RAW_BLOCKS[5:] + b"\x43\x1f\0\0"))
    ],
    "a checksum that is not right": [bytes(8) + chunk_of(ZERO, ZERO)[8:]],
    "a head alone": [chunk_of(ZERO, ZERO)[:24] + bytes(16)],
}


@pytest.mark.parametrize("lie", PLANES)
def test_a_chunk_of_planes_that_lies_is_refused_with_little_memory(
    tmp_path: Path, lie: str
) -> None:
    check_refused(tmp_path, compressed(2000, PLANES[lie], "zstd-planes", "int16"), 2 * MIB)


def test_honest_chunks_of_planes_are_read(tmp_path: Path) -> None:
    """Whose checks the lies above must not be stopped by."""
    path = tmp_path / "packed.safetensors"
    for planes in (
        ((CONSTANT, 7, b""), (PACKED, 0, HONEST)),
        (NOISE, (PACKED, 0, RAW_BLOCKS + b"\x43\x1f\0" + b"1")),
    ):
        content = compressed(2000, [chunk_of(*planes)], "zstd-planes", "int16")
        path.write_bytes(content)
        value = stored_tensors(open_shard(path))["a"].load()
        low = torch.full((1000,), 7) if planes[0][0] == CONSTANT else torch.arange(250).repeat(4)
        high = 0 if planes[1][2] == HONEST else ord("1")
        assert value.tolist() == (low + 256 * high).tolist()


def test_chunks_of_planes_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    whole = [chunk_of(ZERO, ZERO, start=number * MIB, nbytes=MIB) for number in range(2)]
    path = tmp_path / "packed.safetensors"
    path.write_bytes(compressed(2 * MIB, whole, "zstd-planes", "int16"))
    assert not stored_tensors(open_shard(path))["a"].load().any()
    check_refused(tmp_path, compressed(2 * MIB, whole[::-1], "zstd-planes", "int16"), 4 * MIB)


def test_a_file_of_planes_cannot_claim_more_than_its_bytes_can_hold(tmp_path: Path) -> None:
    """32 GB of zeros cannot be in a file of 1.3 MB, which is known before any of it is read."""
    path = tmp_path / "packed.safetensors"
    nbytes = 1 << 35
    for length in (0, 1, 39):
        content = compressed(nbytes, [bytes(length)] * (nbytes // MIB), "zstd-planes", "int16")
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=f"its chunks cannot hold {nbytes} bytes"):
            stored_tensors(open_shard(path))


def test_an_honest_chunk_is_read(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    content = [bytes(CHUNK_BYTES), b"12345678"]
    path.write_bytes(compressed(CHUNK_BYTES + 8, [frame(one) for one in content]))
    value = stored_tensors(open_shard(path))["a"].load()
    assert bytes(value.numpy().data) == b"".join(content)


def test_a_file_cannot_claim_more_than_its_bytes_can_hold(tmp_path: Path) -> None:
    """256 GB of zeros cannot be in a file of 8 MB, which is known before any of it is read."""
    path = tmp_path / "packed.safetensors"
    nbytes = 1 << 38
    for length in (0, 1, 127):
        path.write_bytes(compressed(nbytes, [bytes(length)] * (nbytes // CHUNK_BYTES)))
        with pytest.raises(DamagedFileError, match=f"its chunks cannot hold {nbytes} bytes"):
            stored_tensors(open_shard(path))


encoding = st.fixed_dictionaries(
    {
        "codec": st.sampled_from(["raw", "zstd", "zstd-planes"]) | anything,
        "dtype": st.sampled_from(["complex32", "float4_e2m1fn_x2", "bits8", "quint4x2"]) | anything,
        "shape": st.lists(numbers, max_size=3) | anything,
    },
    optional={"chunks": st.lists(st.integers(-1, 5), max_size=3) | anything},
)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(deadline=None, max_examples=120)
@given(encoding)
def test_made_up_descriptions_are_refused_or_give_what_they_say(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any]
) -> None:
    text = json.dumps({"a": said})
    assume("\\ud" not in text)
    path = tmp_path_factory.getbasetemp() / "made-up.safetensors"
    path.write_bytes(packed(text))
    shard = open_shard(path)
    try:
        tensor = stored_tensors(shard)["a"]
        value = tensor.load()
    except DamagedFileError:
        return
    assert value.numel() * value.dtype.itemsize == 4
    assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape)
