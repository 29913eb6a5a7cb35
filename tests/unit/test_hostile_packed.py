"""What a file says of its packed tensors is not believed either."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shard_files import FRAME_CHUNK_BYTES as CHUNK_BYTES
from shard_files import entry, file_bytes, in_child, open_shard

from diskoffload.errors import DamagedFileError
from diskoffload.store.encoded import ENCODING_KEY
from diskoffload.store.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("no_leaks")


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


def compressed(claimed_bytes: int, chunks: list[bytes]) -> bytes:
    """Put a file together whose tensor of bytes is said to be in these chunks."""
    text = described(codec="zstd", dtype="uint8", shape=[claimed_bytes], chunks=[*map(len, chunks)])
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
    path = tmp_path / "packed.safetensors"
    path.write_bytes(compressed(*CHUNKS[lie]))

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
    assert found[0] < 2 * CHUNK_BYTES + (8 << 20)


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
        "codec": st.sampled_from(["raw", "zstd"]) | anything,
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
