"""Headers that chance made: refused, or consistent, and judged as the reference does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from shard_files import entry, file_bytes, parse, reference_accepts

from diskoffload.errors import DamagedFileError
from diskoffload.store.header import Header

pytestmark = pytest.mark.usefixtures("no_leaks")


def valid_file() -> bytes:
    tensors = {
        "model.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "model.bias": torch.arange(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(True),
        "empty": torch.empty(0, 4, dtype=torch.int64),
    }
    return save(tensors, metadata={"format": "pt"})


VALID = valid_file()


def test_every_cut_of_a_valid_file_is_refused() -> None:
    parse(VALID)
    for stop in range(len(VALID)):
        with pytest.raises(DamagedFileError):
            parse(VALID[:stop])
        assert not reference_accepts(VALID[:stop])


def check_consistent(header: Header, content: bytes) -> None:
    """Check that everything a header says can be acted on without further checks."""
    end = header.data_offset
    for name, spec in header.specs.items():
        assert spec.name == name
        name.encode("utf-8")
        assert spec.offset == end
        end += spec.nbytes
        like = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        assert like.numel() * like.itemsize == spec.nbytes
    assert end == header.file_bytes == len(content)


def header_text(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


# What we let pass and the reference does not: a minus before zero; numbers out of range in
# fields that nobody reads.
_LENIENT = re.compile(rb"-0|[0-9][eE.]|[0-9]{19}")


def compare(content: bytes) -> None:
    try:
        header = parse(content)
    except DamagedFileError:
        return  # whether that was right, ATTACKS says case by case
    check_consistent(header, content)
    assert reference_accepts(content) or _LENIENT.search(header_text(content))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID)
    header_end = 8 + int.from_bytes(VALID[:8], "little")
    keep_length = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(8 if keep_length else 0, header_end - 1))
        width = draw(st.integers(0, 3))
        new = draw(
            st.sampled_from([b"", b"0", b"9", b"-", b"[", b"]", b'"', b",", b"{", b"}", b":", b" "])
            | st.binary(max_size=3)
            | st.just(bytes(content[place : place + 12]))
        )
        content[place : place + width] = new
    if keep_length:
        delta = len(content) - len(VALID)
        content[:8] = (header_end - 8 + delta).to_bytes(8, "little")
    return bytes(content)


@settings(deadline=None, max_examples=600)
@given(mutated())
def test_mutated_files_are_refused_or_consistent(content: bytes) -> None:
    compare(content)


numbers = st.integers(-2, 10) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64])
scalars = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=3)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
dtypes = st.sampled_from(["U8", "BOOL", "F32", "BF16", "C64", "F4", "F6_E2M3", "F8_E4M3", "F128"])
mostly_entry = st.fixed_dictionaries(
    {
        "dtype": dtypes | anything,
        "shape": st.lists(numbers, max_size=4) | anything,
        "data_offsets": st.tuples(numbers, numbers) | anything,
    },
    optional={"more": anything},
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "c"]) | st.text(max_size=3), mostly_entry, max_size=3
)


@settings(deadline=None, max_examples=250)
@given(headers, st.integers(0, 24))
def test_made_up_headers_are_refused_or_consistent(header: dict[str, Any], nbytes: int) -> None:
    compare(file_bytes(header, bytes(nbytes)))


honest = st.tuples(
    st.sampled_from([("U8", 8), ("BOOL", 8), ("F32", 32), ("BF16", 16), ("C64", 64), ("F4", 4)]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 20).map(lambda roll: roll == 0),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(honest, max_size=4), st.randoms(use_true_random=False))
def test_nearly_honest_headers_are_judged_as_the_reference_does(
    tensors: list[tuple[tuple[str, int], list[int], bool]], order: Any
) -> None:
    header, end = {}, 0
    for number, ((dtype, bits), shape, spoil) in enumerate(tensors):
        nbytes = torch.Size(shape).numel() * bits // 8
        header[f"t{number}"] = entry(
            dtype=dtype, shape=shape, data_offsets=[end, end + nbytes + spoil]
        )
        end += nbytes
    names = list(header)
    order.shuffle(names)
    content = file_bytes({name: header[name] for name in names}, bytes(end))
    try:
        check_consistent(parse(content), content)
        ours = True
    except DamagedFileError:
        ours = False
    assert ours == reference_accepts(content)
