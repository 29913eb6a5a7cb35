"""What a file says of its packed tensors is not believed either."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shard_files import entry, file_bytes, open_shard

from diskoffload.errors import DamagedFileError
from diskoffload.store.stored import ENCODING_KEY, stored_tensors

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
