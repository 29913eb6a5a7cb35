"""A device that fails, and limits on descriptors and mappings: named, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from fault_cases import (
    Failing,
    check,
    check_committed,
    check_reopened,
    edit,
    in_child,
    limited,
    offloaded,
    tried,
    values,
)
from linux_only import linux_only
from safetensors.torch import save_file

import diskoffload
from diskoffload.errors import StorageError
from diskoffload.store.commits import Committed
from diskoffload.store.folder import Folder
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files
from diskoffload.system.headroom import machine_memory
from diskoffload.system.memory import _MAP_FAILED, _libc, map_file

WRITING = ["create", "write", "set_size", "sync", "sync_folder", "rename", "open_for_reading"]


@pytest.mark.parametrize("what", WRITING)
def test_a_device_that_fails(tmp_path: Path, what: str) -> None:
    place, files = tmp_path / "off", Failing(errno.EIO)
    net = offloaded(place, files)
    before = values(net)
    diskoffload.commit(net)
    after = edit(net, 3)
    files.failing = {what}
    for _ in range(2):
        with pytest.raises(StorageError, match="the device failed"):
            diskoffload.commit(net)
    check(net, after)
    files.failing = set()
    check_committed(place, before)
    assert diskoffload.commit(net).number == 2
    check_committed(place, after)
    del net
    check_reopened(place, after)


def test_a_device_that_cannot_be_read(tmp_path: Path) -> None:
    files = Failing(errno.EIO)
    folder = Folder(tmp_path / "off", files=files)
    value = torch.arange(5000.0)
    ticket = folder.put("w", value, "zstd")
    folder.flush()
    stored = ticket.stored
    assert stored is not None
    files.failing = {"read_into"}
    with pytest.raises(StorageError, match="the device failed") as caught:
        stored.load()
    assert caught.value.filename == str(stored.shards[0].path)
    files.failing = set()
    assert torch.equal(stored.load(), value)


# ------------------------------------------------------------------- descriptors


def descriptors() -> int:
    return max(map(int, os.listdir("/proc/self/fd")))


# The second is the one that pagemap is read through.
@pytest.mark.parametrize(
    "spare", [0, pytest.param(1, marks=linux_only("a commit needs one descriptor less"))]
)
def test_no_descriptor_is_left_for_a_commit(tmp_path: Path, spare: int) -> None:
    place = tmp_path / "off"

    def work() -> list[str]:
        net = offloaded(place)
        before = values(net)
        diskoffload.commit(net)
        after = edit(net, 3)
        with limited(resource.RLIMIT_NOFILE, descriptors() + 1), contextlib.ExitStack() as taken:
            fds = []
            with contextlib.suppress(OSError):  # none is left below the limit
                while True:
                    fds.append(os.open("/dev/null", os.O_RDONLY))
            for fd in fds[spare:]:
                taken.callback(os.close, fd)
            for fd in fds[:spare]:
                os.close(fd)
            answers = [tried(partial(diskoffload.commit, net)) for _ in range(2)]
            answers.append(tried(lambda: Folder(tmp_path / "other")))
            if spare == 0:
                answers.append(tried(machine_memory))
        check(net, after)
        check_committed(place, before)
        answers.append(str(diskoffload.commit(net).number))
        del net
        check_reopened(place, after)
        return [*answers, tried(lambda: Folder(tmp_path / "other"))]

    answer, signal = in_child(work)
    assert signal == 0
    assert isinstance(answer, list), answer
    for text in answer[:-2]:
        assert text.startswith("StorageError: [Errno 24]"), text
        assert "ulimit -n" in text
    assert answer[-2:] == ["2", "ok"]


SHARDS = 300
CHILD_DESCRIPTORS = 64


def test_a_model_of_many_files_needs_few_descriptors(tmp_path: Path) -> None:
    place = tmp_path / "off"

    def work() -> list[object]:
        with limited(resource.RLIMIT_NOFILE, descriptors() + CHILD_DESCRIPTORS):
            folder = Folder(place, group_bytes=1)
            tickets = [folder.put(str(n), torch.full((64,), float(n)), None) for n in range(SHARDS)]
            folder.flush()
            entries = {}
            for number, ticket in enumerate(tickets):
                assert ticket.stored is not None
                at = [ticket.stored.shards[0].path.name, str(number)]
                entries[str(number)] = {"at": at, "is": "buffer"}
            made = folder.commit(Committed(entries=entries), [t.stored.shards[0] for t in tickets])
            del folder, tickets, ticket
            gc.collect()
            again = Folder(place)
            shards = [again.committed_shard(name) for name in made.shards]
            first = [stored_tensors(shard) for shard in shards]
            found = {name: one.mapped() for table in first for name, one in table.items()}
            right = sum(bool((found[str(n)] == n).all()) for n in range(SHARDS))
            return [len(shards), right, len(made.shards)]

    assert in_child(work) == ([SHARDS, SHARDS, SHARDS], 0)


# ------------------------------------------------------------------- mappings


@linux_only("nobody says how many mappings there are")
def test_the_limit_on_mappings_is_named_and_files_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(64.0)}, path)

    def work() -> list[object]:
        shard = Shard(path, Files())
        spec = shard.header.specs["a"]
        table = stored_tensors(shard)
        fd = os.open(path, os.O_RDONLY)
        pages: list[int] = []
        while not pages or pages[-1] != _MAP_FAILED:
            pages.append(_libc.mmap(None, 1, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0))
        text = tried(lambda: map_file(fd, 1, "x"))
        mapped = [shard.mapped(spec) is None for _ in range(3)]
        loaded = bool((table["a"].load() == torch.arange(64.0)).all())
        said = [record.getMessage() for record in caplog.records]
        for page in pages[:-1]:
            _libc.munmap(page, 1)
        shard._map_again_at = 0.0  # a second later
        return [text, *mapped, loaded, said, shard.mapped(spec) is not None]

    answer, signal = in_child(work)
    assert signal == 0
    assert isinstance(answer, list), answer
    text, *good, said, again = answer
    assert all(good)
    assert again
    assert text.startswith("StorageError: [Errno 12]")
    assert "vm.max_map_count allows" in text
    assert len(said) == 1
    assert "read into memory rather than mapped" in said[0]
    assert "vm.max_map_count allows" in said[0]
