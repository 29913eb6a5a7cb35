"""A shard that somebody else changes, removes or replaces while it is open.

Each in a process of its own, so that a SIGBUS is seen as what it is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_cases import (
    bare,
    check,
    check_reopened,
    edit,
    in_child,
    offloaded,
    tried,
    values,
)
from safetensors.torch import save_file

import diskoffload
from diskoffload.errors import DamagedFileError
from diskoffload.residency.held import held_of
from diskoffload.store.shard import Shard
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.store.stored import Stored, stored_tensors
from diskoffload.system.files import Files

VALUE = torch.arange(50_000.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": VALUE}, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def truncate(path: Path) -> None:
    os.truncate(path, 200)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"otherwise")


def replace(path: Path) -> None:
    other = path.with_name("other")
    save_file({"a": VALUE + 1}, other)
    other.rename(path)


def remake(path: Path) -> None:
    path.unlink()
    save_file({"a": VALUE + 1}, path)


CHANGES = [truncate, extend, overwrite]


def copy(shard: Shard, to: Path) -> None:
    to.unlink(missing_ok=True)
    with ShardWriter(to, [("a", torch.float32, tuple(VALUE.shape))], Files()) as writer:
        shard.copy_to(shard.header.specs["a"], writer, "a")
        writer.publish(durable=False)


def ways_to_read(path: Path, shard: Shard) -> dict[str, Callable[[], object]]:
    spec, stored = shard.header.specs["a"], stored_tensors(shard)["a"]
    return {
        "mapped": lambda: float(stored.mapped().sum()),  # type: ignore[union-attr]
        "load": stored.load,
        "read_into": lambda: shard.read_into(spec, memoryview(bytearray(spec.nbytes))),
        "verify": lambda: shard.verify(spec, "0" * 32),
        "copy_to": lambda: copy(shard, path.with_name("copy")),
        "twin": lambda: float(shard.twin().mapped(spec).sum()),  # type: ignore[union-attr]
        "check_unchanged": shard.check_unchanged,
    }


@pytest.mark.parametrize("rests", [False, True], ids=["open", "at rest"])
@pytest.mark.parametrize("was_mapped", [False, True], ids=["fresh", "mapped"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_noticed_before_a_byte_is_given(
    path: Path, change: Callable[[Path], None], was_mapped: bool, rests: bool
) -> None:
    def work() -> dict[str, str]:
        shard = Shard(path, Files())
        ways = ways_to_read(path, shard)
        if was_mapped:
            ways["mapped"]()
        if rests:
            shard.rest()
        change(path)
        return {name: tried(way) for name, way in ways.items()}

    answer, ended_by = in_child(work)
    assert ended_by == 0
    assert isinstance(answer, dict)
    for name, text in answer.items():
        assert text.startswith("DamagedFileError"), name
        assert "was changed while it was open" in text
        assert str(path) in text


@pytest.mark.parametrize("rests", [False, True], ids=["open", "at rest"])
@pytest.mark.parametrize("change", [Path.unlink, replace, remake])
def test_what_is_removed_or_replaced_stays_whole(
    path: Path, change: Callable[[Path], None], rests: bool
) -> None:
    def work() -> list[bool]:
        shard = Shard(path, Files())
        if rests:
            shard.rest()
        change(path)
        stored: Stored = stored_tensors(shard)["a"]
        copy(shard, path.with_name("copy"))
        copied = stored_tensors(Shard(path.with_name("copy"), Files()))["a"].load()
        mapped = stored.mapped()
        assert mapped is not None
        return [torch.equal(one, VALUE) for one in (mapped, stored.load(), copied)]

    assert in_child(work) == ([True] * 3, 0)


def test_a_file_changed_while_it_is_read_is_noticed(path: Path) -> None:
    class ChangedMeanwhile(Files):
        def read_into(self, fd: int, target: memoryview, offset: int, path: Path) -> None:
            super().read_into(fd, target, offset, path)
            if len(target) == VALUE.nbytes:
                overwrite(path)

    stored = stored_tensors(Shard(path, ChangedMeanwhile()))["a"]
    with pytest.raises(DamagedFileError, match="was changed while it was open"):
        stored.load()


def test_what_cannot_be_noticed_is_sigbus_and_reading_avoids_it(path: Path) -> None:
    def touch() -> float:
        tensor = Shard(path, Files()).mapped(Shard(path, Files()).header.specs["a"])
        assert tensor is not None
        truncate(path)
        return float(tensor[-1])

    def read() -> str:
        shard = Shard(path, Files(may_map=False))
        stored = stored_tensors(shard)["a"]
        assert stored.mapped() is None
        before = stored.load()
        truncate(path)
        return f"{before[-1]} {tried(stored.load)}"

    answer, ended_by = in_child(touch)
    assert (answer, ended_by) == (None, signal.SIGBUS)  # the docstring of Shard says so
    save_file({"a": VALUE}, path)
    answer, ended_by = in_child(read)
    assert ended_by == 0
    assert str(answer).startswith("49999.0 DamagedFileError")


# ---------------------------------------------------------------- in an offload folder


@pytest.mark.parametrize("change", [Path.unlink, replace])
@pytest.mark.parametrize("when", ["before the commit", "after a commit"])
def test_a_commit_refers_to_nothing_that_is_gone(
    tmp_path: Path, change: Callable[[Path], None], when: str
) -> None:
    place = tmp_path / "off"
    net = offloaded(place)
    edit(net, 3)
    if when == "after a commit":
        diskoffload.commit(net)
    net.up._parameters.sync()
    net._buffers.sync()
    expected = values(net)
    for shard in sorted(place.glob("*.safetensors")):
        change(shard)
    with pytest.raises(DamagedFileError, match="removed or changed by somebody else"):
        diskoffload.commit(net)
    check(net, expected)
    diskoffload.commit(net)  # what the mappings still have is written anew
    del net
    check_reopened(place, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_changed_beneath_a_model_is_named(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    def work() -> list[str]:
        net = offloaded(tmp_path / "off")
        diskoffload.commit(net)
        held = held_of(net.down.weight)
        shard = held.backing.stored.shards[0]  # type: ignore[union-attr]
        change(shard.path)
        return [tried(lambda: diskoffload.commit(net)), tried(shard.check_unchanged)]

    answer, ended_by = in_child(work)
    assert ended_by == 0
    assert isinstance(answer, list)
    assert all(text.startswith("DamagedFileError") for text in answer), answer
    if change is not overwrite:  # the bytes differ, and headers and lengths do not
        with pytest.raises(DamagedFileError, match=r"not the file that was committed|bytes"):
            diskoffload.reopen(tmp_path / "off", model=bare())
    with pytest.raises(DamagedFileError):
        diskoffload.reopen(tmp_path / "off", model=bare(), verify="full")
