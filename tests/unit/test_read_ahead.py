"""Tensors that are read into the page cache ahead of their use, piece by piece."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from linux_only import linux_only
from page_cache import cached_pages
from safetensors.torch import save_file
from thread_limit import threads_left

from diskoffload.residency.foresight import Foresight
from diskoffload.residency.mapped import Mapped
from diskoffload.store import lingering, read_ahead
from diskoffload.store.read_ahead import ReadAhead
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.system.files import Files
from diskoffload.system.memory import HUGE_PAGE_BYTES

MIB = 1 << 20


class HeldUp(Shard):
    """Tells of its pieces, none of which is read before ``go``."""

    def populate(self, spec: Any, start: int, stop: int) -> None:
        self.__dict__.setdefault("pieces", []).append((start, stop))
        began.release()
        assert go.wait(60)


began, go = threading.Semaphore(0), threading.Event()


@pytest.fixture(autouse=True)
def begin_anew() -> None:
    global began
    began = threading.Semaphore(0)
    go.clear()


def made(folder: Path, nbytes: int, kind: type[Shard] = Shard) -> ShardTensor:
    save_file({"a": torch.ones(nbytes, dtype=torch.uint8)}, folder / "x.safetensors")
    found = stored_tensors(kind(folder / "x.safetensors", Files()))["a"]
    assert isinstance(found, ShardTensor)
    return found


def wait_for_threads() -> None:
    until_seconds = time.monotonic() + 20
    while any(one.name == "diskoffload-ahead" for one in threading.enumerate()):
        assert time.monotonic() < until_seconds
        time.sleep(0.01)


@pytest.mark.parametrize("nbytes", [1, 3 * MIB, 17 * MIB + 3])
def test_pieces_begin_where_huge_pages_of_the_file_do(tmp_path: Path, nbytes: int) -> None:
    stored = made(tmp_path, nbytes, HeldUp)
    go.set()
    ReadAhead().begin([stored])
    wait_for_threads()
    pieces = sorted(stored.shard.__dict__["pieces"])
    assert [start for start, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
    assert (pieces[0][0], pieces[-1][1]) == (0, nbytes)
    assert all((stored.spec.offset + start) % HUGE_PAGE_BYTES == 0 for start, _ in pieces[1:])
    assert max(stop - start for start, stop in pieces) <= 2 * HUGE_PAGE_BYTES


def test_only_the_pieces_in_hand_are_read_when_their_owner_goes(tmp_path: Path) -> None:
    stored = made(tmp_path, 60 * MIB, HeldUp)
    mapped = Mapped(Foresight())
    mapped._read_ahead.begin([stored])
    for _ in range(read_ahead._THREADS):
        assert began.acquire(timeout=60)
    del mapped
    gc.collect()
    go.set()
    wait_for_threads()
    assert len(stored.shard.__dict__["pieces"]) == read_ahead._THREADS


def test_a_thread_stays_for_what_comes_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingering, "_LINGER_SECONDS", 60)
    stored, ahead = made(tmp_path, MIB, HeldUp), ReadAhead()
    go.set()
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda self: (started.append(self), start(self))[1]
    )
    for _ in range(5):
        ahead.begin([stored])
        assert began.acquire(timeout=60)
        until_seconds = time.monotonic() + 20
        while not ahead._idle:
            assert time.monotonic() < until_seconds
            time.sleep(0.001)
    assert len(started) == 1
    monkeypatch.setattr(lingering, "_LINGER_SECONDS", 0)
    ahead.begin([stored])
    wait_for_threads()


@pytest.mark.parametrize("count", [0, 1])
def test_it_is_a_hint_where_the_system_has_no_thread_left(tmp_path: Path, count: int) -> None:
    stored, ahead = made(tmp_path, 9 * MIB, HeldUp), ReadAhead()
    go.set()
    with threads_left(count):
        ahead.begin([stored])
        wait_for_threads()
    pieces = len(stored.shard.__dict__.get("pieces", ()))
    assert (pieces > 0) == (count > 0)
    ahead.begin([stored])
    wait_for_threads()
    assert not ahead._waiting
    assert len(stored.shard.__dict__["pieces"]) > pieces


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_forgets_though_the_lock_was_held(tmp_path: Path) -> None:
    stored, ahead = made(tmp_path, MIB), ReadAhead()
    with ahead._changed:  # by a thread of the parent's that is not in the child
        pid = os.fork()
        if not pid:
            signal.alarm(20)
            ahead.forget()
            ahead.begin([stored])
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@linux_only("nothing is read ahead")
def test_what_was_asked_for_is_in_the_page_cache(disk_path: Path) -> None:
    stored = made(disk_path, 9 * MIB)
    with (disk_path / "x.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ReadAhead().begin([stored])
    wait_for_threads()
    assert all(cached_pages(disk_path / "x.safetensors"))


@pytest.mark.parametrize("sizes", [[], [1], [40, 40, 40, 40], [1] * 200, [200, 1, 200, 1]])
def test_so_much_is_asked_for_before_what_comes_first_is_given(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", 64)
    asked: list[int] = []
    ahead = ReadAhead()
    monkeypatch.setattr(ahead, "begin", lambda wanted: asked.append(wanted[0].spec.nbytes))

    class OfSize:
        def __init__(self, nbytes: int) -> None:
            self.spec = self
            self.nbytes = nbytes

    reads: Any = lambda item: [OfSize(item)] if item > 0 else []  # noqa: E731
    given: list[int] = []
    for item in ahead.through(sizes, reads):
        given.append(item)
        beyond = asked[len(given) :]
        assert asked[: len(given)] == given  # in the same order, and the one that is given too
        assert sum(beyond) >= 64 or len(asked) == len(sizes)
        assert sum(beyond[:-1]) < 64
    assert given == sizes
    assert list(ahead.through([0, -1], reads)) == [0, -1]
    assert len(asked) == len(sizes)  # nothing was asked for what reads nothing
