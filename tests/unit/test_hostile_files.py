"""Files made to hurt: each is refused by name, with little memory, or is harmless.

The list of attacks is written down once, in ``ATTACKS``, and shown to the reference library
as well: where it accepts what we refuse, ``STRICTER`` says why we do.
"""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from shard_files import entry, file_bytes, open_shard, reference_accepts

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.header import MAX_HEADER_BYTES

pytestmark = pytest.mark.usefixtures("no_leaks")

DATA = b"1234"
MIB = 1 << 20
ONE = json.dumps({"a": entry()}).encode()


def raw(text: str | bytes, data: bytes = DATA) -> bytes:
    return file_bytes(text.encode("utf-8") if isinstance(text, str) else text, data)


def one(data: bytes = DATA, **changes: Any) -> bytes:
    return file_bytes({"a": entry(**changes)}, data)


def pair(first: tuple[int, int], second: tuple[int, int], nbytes: int) -> bytes:
    header = {
        name: entry(shape=[stop - start], data_offsets=[start, stop])
        for name, (start, stop) in (("a", first), ("b", second))
    }
    return file_bytes(header, bytes(nbytes))


def field(name: str, text: str) -> bytes:
    """Put raw JSON text in the place of one field's value."""
    parts = {"dtype": '"U8"', "shape": "[4]", "data_offsets": "[0,4]", name: text}
    return raw('{"a":{' + ",".join(f'"{key}":{value}' for key, value in parts.items()) + "}}")


NESTED = "[" * 600 + "]" * 600
ATTACKS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\2\0\0\0\0\0\0",
    "length zero": bytes(8),
    "length only": (2).to_bytes(8, "little"),
    "length beyond the file": file_bytes(ONE, DATA, claimed=len(ONE) + len(DATA) + 1),
    "length of all ones": b"\xff" * 8 + b"{}",
    "length into the data": file_bytes(ONE, b"    ", claimed=len(ONE) + 4),
    "length too small": file_bytes(ONE, DATA, claimed=len(ONE) - 1),
    "more than 100 MB claimed": file_bytes(b"{}", claimed=MAX_HEADER_BYTES + 1),
    "truncated": one(DATA[:3]),
    "trailing byte": one(DATA + b"5"),
    "no header start": raw("[]"),
    "leading space": raw(b" " + ONE),
    "byte order mark": raw(b"\xef\xbb\xbf" + ONE),
    "NUL after the JSON": raw(ONE + b"\0"),
    "two values": raw(ONE + b"{}"),
    "not UTF-8": raw(b'{"\xff":' + json.dumps(entry()).encode() + b"}"),
    "UTF-16": raw(ONE.decode().encode("utf-16-le")),
    "control character in a string": raw(ONE.replace(b'"a"', b'"\n"')),
    "lone surrogate in a name": raw(ONE.replace(b'"a"', b'"\\ud800"')),
    "lone surrogate in metadata": raw(b'{"__metadata__":{"k":"\\udfff"},' + ONE[1:]),
    "unterminated": raw(ONE[:-1]),
    "comma at the end": raw(ONE[:-1] + b",}"),
    "single quotes": raw(ONE.replace(b'"', b"'")),
    "deep lists": raw('{"a":' + "[" * 100_000),
    "deep tables": raw('{"a":' * 100_000),
    "nested shape": field("shape", NESTED),
    "nested offsets": field("data_offsets", NESTED),
    "nested dtype": field("dtype", NESTED),
    "overlap": pair((0, 4), (2, 6), 6),
    "same place": pair((0, 4), (0, 4), 4),
    "inside another": pair((0, 8), (2, 4), 8),
    "overlap that a hole makes up for": pair((0, 4), (2, 6), 8),
    "same place, and as much unused": pair((0, 4), (0, 4), 8),
    "hole between": pair((0, 4), (6, 8), 8),
    "hole before": one(b"x" + DATA, data_offsets=[1, 5]),
    "hole after": one(DATA + bytes(4)),
    "beyond the file": one(data_offsets=[4, 8]),
    "end before start": one(data_offsets=[4, 0]),
    "end before start, empty shape": one(shape=[0], data_offsets=[4, 0]),
    "negative offset": one(data_offsets=[-4, 0]),
    "negative size": one(shape=[-4]),
    "two negative sizes": one(shape=[-2, -2]),
    "offset of 2**64": one(data_offsets=[0, 1 << 64]),
    "offset of 2**63": one(data_offsets=[0, 1 << 63]),
    "size of 2**64 + 4": one(shape=[(1 << 64) + 4]),
    "product wraps to 4": one(shape=[4, (1 << 62) + 1]),
    "product wraps with the element": one(b"", dtype="F64", shape=[1 << 61], data_offsets=[0, 0]),
    "no elements, overflowing sizes": one(b"", shape=[1 << 62, 4, 0], data_offsets=[0, 0]),
    "no elements, overflowing strides": one(b"", shape=[0, 1 << 62, 4], data_offsets=[0, 0]),
    "huge number": field("shape", "[" + "9" * 4000 + "]"),
    "number of 5,000 digits": field("shape", "[" + "9" * 5000 + "]"),
    "fraction in a shape": field("shape", "[4.0]"),
    "exponent in a shape": field("shape", "[4e0]"),
    "infinite size": field("shape", "[1e999]"),
    "bool in a shape": one(shape=[True, 4]),
    "bool in offsets": one(b"1", shape=[1], data_offsets=[False, True]),
    "text in a shape": one(shape=["4"]),
    "null in a shape": one(shape=[None]),
    "shape is a number": one(shape=4),
    "shape is a table": one(shape={"0": 4}),
    "shape is null": one(shape=None),
    "65 dimensions": one(shape=[1] * 64 + [4]),
    "a million dimensions": one(shape=[1] * 1_000_000 + [4]),
    "one offset": one(data_offsets=[0]),
    "three offsets": one(data_offsets=[0, 4, 4]),
    "offsets are text": one(data_offsets="04"),
    "length does not fit the shape": one(shape=[5]),
    "length does not fit the dtype": one(dtype="U16"),
    "half a byte over": one(dtype="F4", shape=[7]),
    "unknown dtype": one(dtype="F128"),
    "dtype in small letters": one(dtype="u8"),
    "empty dtype": one(dtype=""),
    "dtype is a list": one(dtype=[]),
    "dtype is a table": one(dtype={}),
    "dtype is a number": one(dtype=8),
    "dtype is null": one(dtype=None),
    "no dtype": file_bytes({"a": {"shape": [4], "data_offsets": [0, 4]}}, DATA),
    "no shape": file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, DATA),
    "no offsets": file_bytes({"a": {"dtype": "U8", "shape": [4]}}, DATA),
    "tensor is null": file_bytes({"a": None}, DATA),
    "tensor is a number": file_bytes({"a": 4}, DATA),
    "tensor is a list": file_bytes({"a": ["U8", [4], [0, 4]]}, DATA),
    "NaN": field("shape", "[NaN]"),
    "NaN where nobody looks": field("more", "NaN"),
    "Infinity where nobody looks": field("more", "[-Infinity]"),
    "a name twice": raw(ONE[:-1] + b"," + ONE[1:]),
    "a field twice": raw(ONE.replace(b'"dtype"', b'"dtype":"U8","dtype"')),
    "metadata twice": raw('{"__metadata__":{},"__metadata__":{}}', b""),
    "metadata key twice": raw('{"__metadata__":{"k":"1","k":"2"}}', b""),
    "metadata of numbers": file_bytes({"__metadata__": {"k": 1}}),
    "metadata of tables": file_bytes({"__metadata__": {"k": {}}}),
    "metadata of null": file_bytes({"__metadata__": {"k": None}}),
    "metadata is a list": file_bytes({"__metadata__": []}),
    "metadata is a tensor": file_bytes({"__metadata__": entry()}, DATA),
}
STRICTER = {
    "leading space": "the format says that a header begins with '{'",
    "a name twice": "which of the two is meant?",
    "metadata key twice": "likewise",
    "65 dimensions": "torch has no such tensor",
    "a million dimensions": "torch has no such tensor",
    "no elements, overflowing strides": "torch has no such tensor",
    "tensor is a list": "the format says that it is a table",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_the_name_of_its_file(tmp_path: Path, attack: str) -> None:
    path = tmp_path / "hostile model.safetensors"
    path.write_bytes(ATTACKS[attack])
    with pytest.raises(DamagedFileError) as caught:
        open_shard(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1000
    assert message.isprintable()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_reference_agrees_but_where_we_have_a_reason(attack: str) -> None:
    assert reference_accepts(ATTACKS[attack]) == (attack in STRICTER)


HARMLESS = {
    "fields we do not know": one(more={"x": [1.5, None]}),
    "metadata is null": file_bytes({"__metadata__": None, "a": entry()}, DATA),
    "line ends after the JSON": raw(ONE + b" \n\r\t"),
    "64 dimensions": one(shape=[1] * 63 + [4]),
    "large empty tensor": one(b"", shape=[0, 1 << 40], data_offsets=[0, 0]),
    "odd characters in a name": file_bytes({"../a\0\n\u202e\\": entry()}, DATA),
    "an emoji as an escaped pair": raw(ONE.replace(b'"a"', b'"\\ud83d\\ude00"')),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_only_odd_is_read(tmp_path: Path, case: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(HARMLESS[case])
    assert reference_accepts(HARMLESS[case])
    shard = open_shard(path)
    (spec,) = shard.header.specs.values()
    tensor = shard.mapped(spec)
    assert tuple(tensor.shape) == spec.shape
    assert bytes(tensor.reshape(-1).tolist()) == HARMLESS[case][spec.offset :]


def test_a_long_name_is_shortened_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(file_bytes({"n" * MIB: entry(dtype="?" * MIB)}, DATA))
    with pytest.raises(DamagedFileError) as caught:
        open_shard(path)
    assert len(str(caught.value)) < 1000


def test_a_huge_claim_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    path.write_bytes((150_000_000).to_bytes(8, "little"))
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match="100 MB"):
            open_shard(path)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------- what is no such file at all


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "none"))) as caught:
        open_shard(tmp_path / "none")
    assert not isinstance(caught.value, DamagedFileError)


@pytest.mark.parametrize("kind", ["folder", "device"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else Path("/dev/zero")
    with pytest.raises(StorageError, match=re.escape(str(path))):
        open_shard(path)
