"""A folder that may not be written to, or no longer: refused by name, and taken up again."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from fault_cases import (
    check,
    check_committed,
    check_reopened,
    edit,
    in_child,
    offloaded,
    tried,
    values,
)

import diskoffload
from diskoffload.errors import StorageError
from diskoffload.residency.held import held_of
from diskoffload.store.folder import Folder
from diskoffload.store.shard import Shard
from diskoffload.store.shard_writer import left_of
from diskoffload.system.files import Files, free_bytes, memory_file_system

NOBODY = 65534
# Root may do everything, so the tests become somebody else, whose folders these are.
USER = NOBODY if os.geteuid() == 0 else None
READ_ONLY, CLOSED = 0o500, 0o000


def work_through(place: Path, locked: Path, mode: int) -> str:
    """Lose a permission amid the work and get it back; say what the commits meanwhile raised."""
    net = offloaded(place)
    before = values(net)
    diskoffload.commit(net)
    after = edit(net, 3)
    locked.chmod(mode)
    try:
        answers = {tried(partial(diskoffload.commit, net)) for _ in range(2)}
        check(net, after)
        answers |= {tried(net.up._parameters.sync)}
    finally:
        locked.chmod(0o700)
    check_committed(place, before)
    check(net, after)
    if diskoffload.commit(net).number != 2:
        return "the commit after it was not the second"
    check_committed(place, after)
    del net
    check_reopened(place, after)
    return " ".join(sorted(answers))


@pytest.mark.parametrize(
    ("which", "mode"), [("folder", READ_ONLY), ("folder", CLOSED), ("parent", CLOSED)]
)
def test_a_permission_lost_while_open(open_place: Path, which: str, mode: int) -> None:
    parent = open_place / "mine"

    def work() -> str:
        parent.mkdir()
        tempfile.tempdir = str(open_place)
        return work_through(parent / "off", parent if which == "parent" else parent / "off", mode)

    answer, signal = in_child(work, USER)
    assert signal == 0
    assert isinstance(answer, str)
    assert answer.startswith("StorageError: [Errno 13]")
    assert "give this user the right" in answer
    assert str(parent / "off") in answer
    assert "PermissionError" not in answer


@pytest.mark.parametrize("mode", [READ_ONLY, CLOSED], ids=["read only", "closed"])
def test_a_folder_that_may_not_be_written_to(open_place: Path, mode: int) -> None:
    place = open_place / "off"

    def work() -> list[str]:
        place.mkdir(mode=mode)
        first = [tried(lambda: Folder(place)), tried(lambda: Folder(place / "inner"))]
        place.chmod(0o700)
        return [*first, tried(lambda: Folder(place))]

    answer, signal = in_child(work, USER)
    assert signal == 0
    assert isinstance(answer, list)
    for text in answer[:2]:
        assert text.startswith("StorageError: [Errno 13]")
        assert "give this user the right" in text
    assert answer[2] == "ok"


def test_nothing_raw_where_one_may_not_look(open_place: Path) -> None:
    place = open_place / "off"

    def work() -> list[str]:
        net = offloaded(place)
        net.up._parameters.sync()
        held = held_of(net.up.weight)
        stored = held.backing.stored
        shard: Shard = stored.shards[0]
        expected = values(net)["up.weight"]
        place.chmod(CLOSED)
        answers = [
            tried(lambda: free_bytes(place / "a")),
            tried(lambda: memory_file_system(place / "a")),
            tried(lambda: left_of(shard.path, [("a", torch.int8, (1,))], Files())),
            tried(lambda: Shard(shard.path, Files())),
            tried(shard.check_unchanged),
            tried(stored.load),
            tried(lambda: shard.verify(stored.spec, stored.digest)),
            tried(lambda: Folder(place / "inner")),
        ]
        # What is mapped needs no permission any more.
        good = [not shard.is_gone(), bool((stored.mapped() == expected).all())]
        place.chmod(0o700)
        good.append(bool((stored.load() == expected).all()))
        return [*answers, *map(str, good)]

    answer, signal = in_child(work, USER)
    assert signal == 0
    assert isinstance(answer, list)
    assert answer[-3:] == ["True"] * 3
    for text in answer[:-3]:
        assert text.startswith("StorageError: [Errno 13]")


@pytest.mark.skipif(USER is None, reason="only root can mount")
def test_a_file_system_that_is_read_only(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=3m")
    net = offloaded(disk / "off")
    expected = values(net)
    diskoffload.commit(net)
    del net
    gc.collect()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="mount it for writing") as caught:
        Folder(disk / "off")
    assert caught.value.errno == errno.EROFS
    check_committed(disk / "off", expected)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    check_reopened(disk / "off", expected)
