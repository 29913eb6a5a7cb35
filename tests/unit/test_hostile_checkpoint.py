"""Checkpoints made to hurt: their index, their config, and what lies under their names."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import entry, file_bytes, in_child

from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import CheckpointError, DamagedFileError, StorageError

pytestmark = pytest.mark.usefixtures("no_leaks")

NOBODY = 65534
INDEX_NAME = "model.safetensors.index.json"
SHARD = file_bytes({"a": entry()}, b"1234")


def folder_with(tmp_path: Path, index: object = None, config: object = None) -> Path:
    """Make a checkpoint of one shard; what is no bytes is written as JSON."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(SHARD)
    for name, content in ((INDEX_NAME, index), ("config.json", config)):
        if content is not None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name).write_bytes(raw)
    return folder


def refusal(path: Path) -> str:
    """Open a checkpoint that must be refused; what would wait for ever fails the test."""
    with pytest.raises(StorageError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert len(message) < 1500
    assert message.isprintable()
    return message


def mapped_to(file: object) -> dict[str, object]:
    return {"weight_map": {"a": file}}


# ------------------------------------------------------------- the index

INDEXES: dict[str, object] = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"weight_map":{"\xff":"one.safetensors"}}',
    "UTF-16": '{"weight_map":{}}'.encode("utf-16-le"),
    "a list": [],
    "a text": "weight_map",
    "a number": 1,
    "null": b"null",
    "deep": b'{"weight_map":' + b'{"":' * 50_000,
    "deep elsewhere": b'{"metadata":' + b"[" * 50_000,
    "no weight_map": {"metadata": {}},
    "weight_map is null": {"weight_map": None},
    "weight_map is a list": {"weight_map": [["a", "one.safetensors"]]},
    "weight_map is a text": {"weight_map": "one.safetensors"},
    "weight_map is empty": {"weight_map": {}},
    "weight_map twice": b'{"weight_map":{"a":"one.safetensors"},"weight_map":{"a":"x"}}',
    "a tensor twice": b'{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}',
    "shard is a number": mapped_to(1),
    "shard is null": mapped_to(None),
    "shard is a list": mapped_to(["one.safetensors"]),
    "shard is a table": mapped_to({"one.safetensors": 0}),
    "NaN": b'{"metadata":{"total_size":NaN},"weight_map":{"a":"one.safetensors"}}',
    "number of 5,000 digits": b'{"metadata":' + b"9" * 5000 + b"}",
    "something behind": json.dumps(mapped_to("one.safetensors")).encode() + b"{}",
    "a thousand keys": {str(number): 0 for number in range(1001)},
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_none_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    folder = folder_with(tmp_path, INDEXES[kind])
    assert str(folder / INDEX_NAME) in refusal(folder)


NAMES: dict[str, str] = {
    "above": "../one.safetensors",
    "above and back": "../checkpoint/one.safetensors",
    "absolute": "/etc/passwd",
    "below": "deeper/one.safetensors",
    "here": "./one.safetensors",
    "a slash behind": "one.safetensors/",
    "the folder itself": ".",
    "the folder above": "..",
    "empty": "",
    "NUL": "one.safetensors\0",
    "NUL alone": "\0",
    "half a character": "one\ud800.safetensors",
    "256 bytes": "n" * 256,
    "256 bytes of other letters": "é" * 128,
    "a megabyte": "n" * (1 << 19),
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, kind: str) -> None:
    folder = folder_with(tmp_path, mapped_to(NAMES[kind]))
    message = refusal(folder)
    assert str(folder / INDEX_NAME) in message
    assert "not the name of a file in its folder; do not trust" in message


@pytest.mark.parametrize(
    "name", ["n" * 255, "é" * 127, "\x1b[31m", "a\nb", "~", "$HOME", "%s{0}", "\u202e", "C:\\x"]
)
def test_a_name_that_is_only_odd_is_looked_for_and_missing(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, mapped_to(name))
    assert "incomplete: of its shards" in refusal(folder)


def test_odd_names_are_read_where_they_are(tmp_path: Path) -> None:
    name = "雪 \n\u202e'\\.safetensors"
    folder = folder_with(tmp_path, mapped_to(name))
    (folder / name).write_bytes(SHARD)
    assert Checkpoint(folder).tensors["a"].load().tolist() == [*b"1234"]


def test_long_names_of_tensors_are_shown_in_part(tmp_path: Path) -> None:
    names = [f"{number}" + "\x1b" * 100_000 for number in range(5)]
    folder = folder_with(tmp_path, {"weight_map": dict.fromkeys(names, "one.safetensors")})
    assert "names tensors that their shards do not have" in refusal(folder)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {names[0]: "/"}}))
    assert "do not trust" in refusal(folder)


# ------------------------------------------------------------- what lies under a shard's name


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_dead_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_to_a_foreign_file(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def an_empty_file(path: Path) -> None:
    path.touch()


THINGS = [
    *(a_folder, a_pipe, a_link_to_a_pipe, a_device, a_loop, a_dead_link),
    *(a_link_to_a_foreign_file, an_empty_file),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("thing", THINGS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("single", [False, True])
def test_what_is_no_shard_is_refused_and_nothing_waits(
    tmp_path: Path, thing: Callable[[Path], None], single: bool
) -> None:
    name = "model.safetensors" if single else "two.safetensors"
    folder = folder_with(tmp_path, None if single else mapped_to(name))
    thing(folder / name)
    assert name in refusal(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("thing", THINGS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", [INDEX_NAME, "config.json"])
def test_what_is_no_json_file_is_refused_and_nothing_waits(
    tmp_path: Path, name: str, thing: Callable[[Path], None]
) -> None:
    folder = folder_with(tmp_path)
    thing(folder / name)
    if thing is a_dead_link and name == "config.json":
        assert Checkpoint(folder).config == {}
        return
    assert name in refusal(folder)


def test_links_out_of_the_folder_are_followed_and_read_only(tmp_path: Path) -> None:
    # A hub's cache is made of them: snapshots/REVISION/NAME -> ../../blobs/HASH.
    folder = folder_with(tmp_path, mapped_to("two.safetensors"))
    blob = tmp_path / "blob"
    blob.write_bytes(SHARD)
    blob.chmod(0o444)
    (folder / "two.safetensors").symlink_to("../blob")
    assert Checkpoint(folder).tensors["a"].load().tolist() == [*b"1234"]
    assert blob.read_bytes() == SHARD


@pytest.mark.parametrize("path", ["n" * 300, "a\0b", "n/" * 3000])
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(StorageError):
        Checkpoint(tmp_path / path)


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a folder that others may enter; pytest's own let nobody else in."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["one.safetensors", INDEX_NAME, "config.json"])
def test_what_may_not_be_read_is_named(place: Path, name: str) -> None:
    folder = folder_with(place, mapped_to("one.safetensors"), {})
    (folder / name).chmod(0)

    def work() -> str:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        return refusal(folder)

    answer = str(in_child(work))
    assert name in answer
    assert "Permission denied" in answer


def test_pickles_are_named_and_never_opened(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.gguf"):
        os.mkfifo(tmp_path / name)  # would wait if it were opened
    assert "which cannot be mapped safely; convert it to safetensors" in refusal(tmp_path)


# ------------------------------------------------------------- the config

CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"a":"\xff"}',
    "a list": b"[]",
    "a text": b'"config"',
    "null": b"null",
    "deep": b'{"a":' + b"[" * 100_000,
    "number of 5,000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "architectures are a number": b'{"architectures":5}',
    "architectures are a text": b'{"architectures":"Llama"}',
    "architectures are lists": b'{"architectures":[["Llama"]]}',
    "more than a million values": b'{"a":[' + b"0," * 1_000_000 + b"0]}",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_none_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    folder = folder_with(tmp_path, mapped_to("one.safetensors"), CONFIGS[kind])
    assert str(folder / "config.json") in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_a_file_far_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path)
    (folder / name).touch()
    os.truncate(folder / name, 1 << 40)  # sparse: it takes no disk
    assert "has 1099511627776 bytes" in refusal(folder)


def test_a_config_may_hold_what_python_writes(tmp_path: Path) -> None:
    raw = b'{"limit":[0.0,Infinity],"a":null,"a":"\\ud800"}'
    folder = folder_with(tmp_path, mapped_to("one.safetensors"), raw)
    assert Checkpoint(folder).config == {"limit": [0.0, float("inf")], "a": "\ud800"}


# ------------------------------------------------------------- made up by chance

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=4)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
files = st.sampled_from(["one.safetensors", "model.safetensors", "config.json", ".", "x"])
weight_maps = st.dictionaries(st.sampled_from(["a", "b"]) | st.text(), files | anything)
indexes = st.fixed_dictionaries(
    {"weight_map": weight_maps | anything}, optional={"metadata": anything, "more": anything}
)


@settings(deadline=None, max_examples=120)
@given(indexes)
def test_made_up_indexes_are_refused_or_give_what_they_say(
    tmp_path_factory: pytest.TempPathFactory, index: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "made-up"
    folder.mkdir(exist_ok=True)
    (folder / "one.safetensors").write_bytes(SHARD)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    try:
        checkpoint = Checkpoint(folder)
    except (CheckpointError, DamagedFileError):
        return
    assert index["weight_map"] == {"a": "one.safetensors"}
    assert checkpoint.tensors["a"].load().tolist() == [*b"1234"]
