"""Inspecting files made to hurt: faults are named, the rest is shown, the table stays one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from shard_files import entry, file_bytes
from test_hostile_checkpoint import SHARD, THINGS, folder_with

from diskoffload.errors import OffloadError
from diskoffload.inspect import inspect_path

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.timeout(20)
def test_inspect_names_every_fault_and_goes_on(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    for number, thing in enumerate(THINGS):
        thing(folder / f"{number}.safetensors")
    (folder / "truncated.safetensors").write_bytes(SHARD[:-1])
    os.close(os.open(os.fsencode(folder) + b"/\xff\x1b[2J.safetensors", os.O_CREAT))
    found = inspect_path(folder)
    assert [len(shard.tensors) for shard in found.shards if shard.fault is None] == [1]
    assert found.totals()["faults"] == len(THINGS) + 2
    for shard in found.shards:
        assert shard.fault is None or shard.path in shard.fault
    json.dumps(found.as_json())
    lines = found.as_table().split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == len(found.shards) + 2 + 1  # a table of one row, and the sum


def test_what_inspect_shows_steers_no_terminal_and_stays_narrow(tmp_path: Path) -> None:
    name = "\x1b[2J\n\u202e" + "n" * 100_000
    empty = entry(shape=[1 << 40, 0] + [1] * 60, data_offsets=[4, 4])
    path = tmp_path / "one.safetensors"
    path.write_bytes(file_bytes({"a": entry(), name: empty}, b"1234"))
    found = inspect_path(path)
    assert found.tensors[1].name == name
    lines = found.as_table().split("\n")
    assert len(lines) == 5
    assert all(line.isprintable() and len(line) < 600 for line in lines)


@pytest.mark.parametrize("path", ["n" * 300, "a\0b", "n/" * 3000])
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(OffloadError):
        inspect_path(tmp_path / path)
