"""A hostile file takes memory and time in proportion to its length, and little of both."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_files import entry, file_bytes, in_child, open_shard, parse

from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import DamagedFileError, OffloadError
from diskoffload.store.encoded import ENCODING_KEY
from diskoffload.store.stored import stored_tensors

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20
HOSTILE_BYTES = 4 * MIB
# Whatever is accepted: a minimal entry of 55 bytes is a tensor of 350.
MOST_FOR_EACH_BYTE = 10
MOST_SECONDS = 60  # of the processor: nothing here takes two of them


def taken_bytes(work: Callable[[], object]) -> tuple[int, str]:
    """Do something in a process of its own: how much it grew at most, and what it raised."""

    def measured() -> list[object]:
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = "accepted"
        try:
            kept = work()  # noqa: F841 - what was made stays until it is measured
        except OffloadError as error:
            said = f"{type(error).__name__}: {error}"
        return [(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, said]

    found = in_child(measured)
    assert isinstance(found, list), found
    return found[0], found[1]


def filled(start: str, unit: str, end: str) -> str:
    return start + unit * (HOSTILE_BYTES // len(unit.encode())) + end


def numbered(unit: str, nbytes: int) -> str:
    """Repeat an entry with names of their own."""
    return ",".join(f'"n{number:x}":{unit}' for number in range(nbytes // (len(unit) + 8)))


# A byte of these takes up to 40 as Python's lists, tables, numbers and strings.
WASTEFUL: dict[str, tuple[str, str, str]] = {
    "lists": ('{"a":[', "[],", "0]}"),
    "nested lists": ('{"a":[', "[[[[]]]],", "0]}"),
    "nested lists in a tensor": ('{"a":{"dtype":[', "[[[[]]]],", "0]}}"),
    "tables": ('{"a":{"x":[', "{},", "0]}}"),
    "nested tables": ('{"a":{"x":[', '{"":{"":{"":0}}},', "0]}}"),
    "numbers": ('{"a":{"shape":[', "999,", "0]}}"),
    "fractions": ('{"a":{"shape":[', "1.5,", "0]}}"),
    "strings": ('{"a":{"dtype":[', '"\u0394bc",', "0]}}"),
    "one name again and again": ("{", '"a":0,', '"b":0}'),
    "one field again and again": ('{"a":{', '"x":0,', '"b":0}}'),
    "a name of megabytes": ('{"', "n", '😀":0}'),
    "a name of escapes": ('{"', "\\u0041", '":0}'),
    "digits": ('{"a":', "9", "}"),
    "digits of a fraction": ('{"a":0.', "5", "}"),
    "opening brackets": ('{"a":', "[", "}"),
    "spaces, then nothing": ("{", " ", ""),
    # Repeated with a name of its own each.
    "fields": ('{"a":{', "0", "}}"),
    "names": ("{", "0", "}"),
    "metadata": ('{"__metadata__":{', '""', "}}"),
}


def wasteful(kind: str) -> bytes:
    start, unit, end = WASTEFUL[kind]
    if kind in ("fields", "names", "metadata"):
        return (start + numbered(unit, HOSTILE_BYTES) + end).encode()
    return filled(start, unit, end).encode()


@pytest.mark.parametrize("kind", WASTEFUL)
def test_a_wasteful_header_is_refused_at_once(kind: str) -> None:
    content = file_bytes(wasteful(kind))
    grown_bytes, said = taken_bytes(lambda: parse(content))
    assert said.startswith("DamagedFileError")
    # The copy of the text that the test's own slice makes, and next to nothing else.
    assert grown_bytes < len(content) + 24 * MIB


def broken_text(nbytes: int) -> bytes:
    return b"{" + b"\x80" * nbytes


def test_a_header_that_is_no_text_is_refused_at_once() -> None:
    content = file_bytes(broken_text(HOSTILE_BYTES))
    grown_bytes, said = taken_bytes(lambda: parse(content))
    assert "not UTF-8" in said
    assert grown_bytes < len(content) + 24 * MIB


COSTLY = ["empty", "sizes", "names of wide characters", "texts of wide characters"]


def costly(kind: str, nbytes: int) -> str:
    """Describe many tensors in a way that costs much for each byte."""
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    sizes = '{"dtype":"U8","shape":[1000,1000,1000,0],"data_offsets":[0,0]}'
    wide = {f"{number:x}{'a' * 1500}😀": json.loads(empty) for number in range(nbytes // 1600)}
    long = "a" * (nbytes // 2) + "😀"
    made: dict[str, Callable[[], str]] = {
        "empty": lambda: "{" + numbered(empty, nbytes) + "}",
        "sizes": lambda: "{" + numbered(sizes, nbytes) + "}",
        "names of wide characters": lambda: json.dumps(wide, ensure_ascii=False),
        "texts of wide characters": lambda: json.dumps(
            {"__metadata__": {"a": long, "b": long + long}}, ensure_ascii=False
        ),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", COSTLY)
def test_what_is_accepted_takes_memory_in_proportion(kind: str) -> None:
    content = file_bytes(costly(kind, 2 * MIB).encode())
    grown_bytes, said = taken_bytes(lambda: parse(content))
    assert said == "accepted"
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(content) + 16 * MIB


def test_fat_that_nobody_reads_is_not_kept() -> None:
    fat = '{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":[' + "[[[[]]]]," * 6000 + "0]}"
    content = file_bytes(("{" + numbered(fat, 2 * MIB) + "}").encode())
    grown_bytes, said = taken_bytes(lambda: parse(content))
    assert said == "accepted"
    assert grown_bytes < len(content) + 24 * MIB


def overlapping(count: int) -> bytes:
    """Describe many tensors in one place, as safetensors' own attack does."""
    place = json.dumps(entry(dtype="F32", shape=[2, 2], data_offsets=[0, 16]))
    text = "{" + ",".join(f'"weight_{number}":{place}' for number in range(count)) + "}"
    return file_bytes(text.encode(), bytes(16))


def test_many_tensors_in_one_place_are_refused_with_little_memory() -> None:
    content = overlapping(30_000)
    grown_bytes, said = taken_bytes(lambda: parse(content))
    assert said.startswith("DamagedFileError")
    assert "overlaps" in said
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(content) + 16 * MIB


@pytest.mark.slow
def test_a_header_of_a_million_tensors_is_read(tmp_path: Path) -> None:
    count = 1_000_000
    entries = (
        f'"layers.{n}.w":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{n + 1}]}}'
        for n in range(count)
    )
    path = tmp_path / "many.safetensors"
    path.write_bytes(file_bytes(("{" + ",".join(entries) + "}").encode(), bytes(count)))
    header_bytes = path.stat().st_size - count

    def read() -> object:
        tensors = stored_tensors(open_shard(path))
        assert len(tensors) == count
        return tensors

    grown_bytes, said = taken_bytes(read)
    assert said == "accepted"
    assert grown_bytes < MOST_FOR_EACH_BYTE * header_bytes


@pytest.mark.slow
def test_safetensors_own_attacks_at_their_own_size() -> None:
    too_long = overlapping(1_500_000)
    assert len(too_long) > 100_000_000
    with pytest.raises(DamagedFileError, match="100 MB"):
        parse(too_long)
    content = overlapping(1_200_000)
    grown_bytes, said = taken_bytes(lambda: parse(content))
    assert "overlaps" in said
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(content)


# ------------------------------------------------------------- what describes packed tensors

SAID = '{"a":{"codec":"zstd","dtype":"int8",'
DESCRIPTIONS: dict[str, tuple[str, str, int, str]] = {
    "nested lists": ('{"a":[', "[[[[]]]],", 500_000, "0]}"),
    "deep lists": ('{"a":', "[", 5_000_000, ""),
    "chunks": (SAID + '"shape":[4],"chunks":[', "0,", 2_000_000, "4]}}"),
    "chunks, some fewer": (SAID + '"shape":[4],"chunks":[', "0,", 500_000, "4]}}"),
    "sizes": (SAID + '"shape":[', "1,", 2_000_000, "4]}}"),
    "sizes, some fewer": (SAID + '"shape":[', "9,", 500_000, "4]}}"),
    "digits": (SAID + '"shape":[', "9", 5_000_000, "]}}"),
    "a long dtype": ('{"a":{"codec":"raw","dtype":"', "x", 900_000, '","shape":[4]}}'),
    "a long codec": ('{"a":{"dtype":"int8","codec":"', "x", 900_000, '","shape":[4]}}'),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_wasteful_description_is_refused_with_little_memory(tmp_path: Path, kind: str) -> None:
    start, unit, count, end = DESCRIPTIONS[kind]
    text = start + unit * count + end
    path = tmp_path / "packed.safetensors"
    path.write_bytes(file_bytes({"__metadata__": {ENCODING_KEY: text}, "a": entry()}, b"1234"))
    shard = open_shard(path)
    grown_bytes, said = taken_bytes(lambda: stored_tensors(shard))
    assert said.startswith("DamagedFileError")
    assert len(said) < 1000
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(text) + 24 * MIB


def test_descriptions_of_tensors_that_are_not_there_are_not_kept(tmp_path: Path) -> None:
    text = "{" + numbered("[[[[[[[[]]]]]]]]", 2 * MIB) + "}"
    path = tmp_path / "packed.safetensors"
    path.write_bytes(file_bytes({"__metadata__": {ENCODING_KEY: text}, "a": entry()}, b"1234"))
    shard = open_shard(path)
    grown_bytes, said = taken_bytes(lambda: stored_tensors(shard))
    assert said == "accepted"
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(text) + 16 * MIB


# ------------------------------------------------------------- a checkpoint's own JSON


def checkpoint_with(tmp_path: Path, name: str, raw: bytes) -> Path:
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "one.safetensors").write_bytes(file_bytes({"a": entry()}, b"1234"))
    return tmp_path


def index_of(kind: str) -> bytes:
    if kind in WASTEFUL:
        return wasteful(kind)
    entries = {
        "values in place of names": numbered("[[]]", HOSTILE_BYTES),
        "one tensor again and again": '"a":"b",' * (HOSTILE_BYTES // 8) + '"a":"b"',
        "tensors that are not there": numbered('"one.safetensors"', MIB),
        "shards that are not there": ",".join(f'"{n}":"{n}"' for n in range(20_000)),
    }
    return ('{"weight_map":{' + entries[kind] + "}}").encode()


INDEXES = [
    *("nested lists", "names", "digits", "opening brackets", "values in place of names"),
    *("one tensor again and again", "tensors that are not there", "shards that are not there"),
]


@pytest.mark.parametrize("kind", INDEXES)
def test_a_wasteful_index_is_refused_with_little_memory(tmp_path: Path, kind: str) -> None:
    raw = index_of(kind)
    folder = checkpoint_with(tmp_path, "model.safetensors.index.json", raw)
    grown_bytes, said = taken_bytes(lambda: Checkpoint(folder))
    assert said.startswith("CheckpointError")
    assert len(said) < 2000
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(raw) + 16 * MIB


@pytest.mark.parametrize("kind", ["lists", "numbers", "digits"])
def test_a_wasteful_config_is_refused_with_little_memory(tmp_path: Path, kind: str) -> None:
    folder = checkpoint_with(tmp_path, "config.json", wasteful(kind))
    grown_bytes, said = taken_bytes(lambda: Checkpoint(folder))
    assert said.startswith("CheckpointError")
    assert grown_bytes < 4 * HOSTILE_BYTES


def test_a_config_of_as_many_values_as_may_be_is_bounded(tmp_path: Path) -> None:
    table = b'{"":' * 7 + b"0" + b"}" * 7 + b","
    raw = b'{"a":[' + table * 70_000 + b"0]}"
    folder = checkpoint_with(tmp_path, "config.json", raw)
    grown_bytes, said = taken_bytes(lambda: Checkpoint(folder))
    assert said == "accepted"
    assert grown_bytes < 300 * MIB


@pytest.mark.slow
def test_an_index_of_a_million_shards_is_refused(tmp_path: Path) -> None:
    weights = ",".join(f'"layers.{n}.w":"model-{n}.safetensors"' for n in range(1_000_000))
    raw = ('{"weight_map":{' + weights + "}}").encode()
    folder = checkpoint_with(tmp_path, "model.safetensors.index.json", raw)
    grown_bytes, said = taken_bytes(lambda: Checkpoint(folder))
    assert "and 999980 more are missing" in said
    assert grown_bytes < MOST_FOR_EACH_BYTE * len(raw)
