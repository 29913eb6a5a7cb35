"""JSON read piece by piece is what ``json.loads`` reads, wherever the pieces end."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import in_child

from diskoffload.errors import DamagedFileError
from diskoffload.store import json_reader
from diskoffload.store.json_reader import JsonReader, brief, short_int

PIECE_BYTES = 1 << 16
ENTRY = b'"a":{"x":[1,-0.5e+3,"\\u00e9\xe9\x9b\xaa",true,null]}'.replace(
    b"\xe9\x9b\xaa", "雪".encode()
)


def refuse(reason: str) -> NoReturn:
    raise DamagedFileError(f"it {reason}")


def read(raw: bytes, most_bytes: int = 1 << 20) -> dict[str, Any]:
    reader = JsonReader(raw, refuse)
    found = reader.table(lambda _: reader.value(most_bytes))
    reader.finish()
    return found


@contextmanager
def pieces_of(nbytes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_PIECE_BYTES", nbytes)
        yield


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
tables = st.dictionaries(st.text(), values, max_size=6)


def encoded(content: object, indent: int | None, ascii_only: bool) -> bytes:
    return json.dumps(content, indent=indent, ensure_ascii=ascii_only).encode(
        "utf-8", "surrogatepass"
    )


@settings(deadline=None, max_examples=100)
@given(tables, st.sampled_from([None, 0, 3]), st.booleans(), st.integers(8, 60))
def test_pieces_of_any_length_give_what_one_gives(
    content: dict[str, Any], indent: int | None, ascii_only: bool, piece_bytes: int
) -> None:
    raw = encoded(content, indent, ascii_only) + b" \r\n\t" * (indent or 0)
    with pieces_of(piece_bytes):
        assert read(raw) == content


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_text_is_refused_or_read_as_json_loads_reads_it(data: st.DataObject) -> None:
    raw = bytearray(encoded(data.draw(tables), data.draw(st.sampled_from([None, 1])), True))
    place = data.draw(st.integers(0, len(raw)))
    junk = st.sampled_from([b"", b"0", b"1e", b",", b"}", b"{", b'"', b"\xe9", b"-", b"NaN", b" "])
    raw[place : place + data.draw(st.integers(0, 3))] = data.draw(junk)
    try:
        expected: Any = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except ValueError:
        expected = None
    with pieces_of(data.draw(st.integers(8, 60))):
        try:
            found: Any = read(bytes(raw))
        except DamagedFileError as error:
            found = str(error)
    if isinstance(found, dict):
        assert found == expected
    else:
        assert not isinstance(expected, dict) or "twice" in found


@pytest.mark.parametrize("piece_bytes", range(8, 80))
def test_no_place_to_cut_changes_a_number_or_a_letter(piece_bytes: int) -> None:
    raw = b"{" + ENTRY + b',"b":' + b"12.5e+10" + b',"c":-1}'
    with pieces_of(piece_bytes):
        assert read(raw) == json.loads(raw)


def test_a_value_that_is_too_long_is_refused_where_it_begins() -> None:
    raw = b'{"a":1,"b":[' + b"0," * PIECE_BYTES + b"0]}"
    assert len(read(raw)["b"]) == PIECE_BYTES + 1
    with pytest.raises(DamagedFileError, match=r"at byte 11: .* value of more than 100000 bytes"):
        read(raw, 100_000)


@pytest.mark.parametrize("shift", range(4))
def test_a_long_value_of_wide_characters_comes_to_an_end(shift: int) -> None:
    # The bound falls into the middle of a character, whichever the shift.
    raw = ("{" + " " * shift + '"a":"' + "😀" * PIECE_BYTES + '"}').encode()
    with pytest.raises(DamagedFileError, match="more than 65536 bytes"):
        read(raw, PIECE_BYTES)
    assert len(read(raw)["a"]) == PIECE_BYTES


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "byte 0: expecting '{'"),
        (b"[]", "byte 0: expecting '{'"),
        (b"{", "byte 1: expecting a key"),
        (b'{"a"', "byte 4: expecting ':'"),
        (b'{"a":', "byte 5: Expecting value"),
        (b'{"a":1', "byte 6: expecting ','"),
        (b'{"a":1,}', "byte 7: expecting a key"),
        (b"{1:2}", "byte 1: expecting a key"),
        (b'{"a":1 2}', "byte 7: expecting ','"),
        (b'{"a":1}x', "byte 7: something follows"),
        (b'{"a":1}' + b" " * 2 * PIECE_BYTES + b"x", "byte 7: something follows"),
        (b'{"\xff":1}', "byte 2: not UTF-8"),
        (b'{"a":"\xe9', "byte 6: not UTF-8"),
        (b'{"a":1,"a":1}', "the key 'a' twice"),
        (b'{"b":{"a":1,"c":2,"a":1}}', "the key 'a' twice"),
        (b'{"a":NaN}', "holds NaN"),
        (b'{"a":[-Infinity]}', "holds -Infinity"),
        (b'{"a":' + b"[" * 50_000, "nested too deeply"),
        (b'{"a":' + b'{"":' * 15_000, "nested too deeply"),
        (b'{"a":' + b"9" * 4301 + b"}", "more than 4300 digits"),
    ],
)
def test_a_fault_is_named_with_its_place(raw: bytes, fault: str) -> None:
    with pytest.raises(DamagedFileError) as caught:
        read(raw)
    assert fault in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_long_name_is_shown_in_part() -> None:
    name = b'"' + b"n" * 100_000 + b'":0'
    with pytest.raises(DamagedFileError, match="twice") as caught:
        read(b"{" + name + b"," + name + b"}")
    assert len(str(caught.value)) < 300
    assert brief("a") == "'a'"


def test_a_name_of_megabytes_is_refused() -> None:
    with pytest.raises(DamagedFileError, match="more than 1048576 bytes"):
        read(b'{"' + b"n" * (2 << 20) + b'":0}')


def test_long_numbers_are_refused_where_python_has_no_bound() -> None:
    assert short_int("-" + "9" * 4299) == -int("9" * 4299)

    def work() -> str:
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(0)  # an application may; then this takes minutes
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        try:
            read(b'{"a":' + b"9" * 30_000_000 + b"}", 40_000_000)
        except DamagedFileError as error:
            return str(error)
        return "read"

    assert "more than 4300 digits" in str(in_child(work))
