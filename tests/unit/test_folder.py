"""One offload folder: what lies in it, and what is left when it goes."""

from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from linux_only import linux_only
from shard_files import mappings_of, noise, same

from diskoffload.errors import ClosedError, InvalidInputError, StorageError
from diskoffload.store.folder import Folder
from diskoffload.store.lock import LOCK_NAME, SHARD_PREFIX
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.files import Files, memory_file_system

pytestmark = pytest.mark.usefixtures("no_leaks")

KIB = 1 << 10


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Name a folder that is not there yet."""
    return tmp_path / "offload"


def names_in(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def shards_in(folder: Path) -> int:
    return sum(name.startswith(SHARD_PREFIX) for name in names_in(folder))


def put(folder: Folder, value: float = 1.0, name: str = "w") -> Ticket:
    return folder.put(name, torch.full((4 * KIB,), float(value)), None)


# ------------------------------------------------------------------------- what is left


def test_all_of_ours_goes_with_the_last_value(place: Path) -> None:
    folder = Folder(place)
    first = put(folder, 1)
    folder.flush()
    second = put(folder, 2)
    folder.flush()
    assert names_in(place)[-1] == LOCK_NAME
    assert shards_in(place) == len(folder.shards()) == 2
    del first
    assert shards_in(place) == len(folder.shards()) == 1
    del folder
    assert second.stored is not None
    assert shards_in(place) == 1  # the value is on disk as long as it is wanted
    assert same(second.stored.load(), torch.full((4 * KIB,), 2.0))
    mapped = second.stored.mapped()
    del second
    assert not place.exists()
    assert mapped is not None
    assert float(mapped[-1]) == 2.0  # memory that is in use stays


def test_a_folder_without_values_goes_at_once(place: Path) -> None:
    folder = Folder(place)
    assert names_in(place) == [LOCK_NAME]
    del folder
    assert not place.exists()


def test_a_folder_that_was_there_stays(place: Path) -> None:
    place.mkdir()
    folder = Folder(place)
    ticket = put(folder)
    folder.flush()
    del ticket, folder
    assert names_in(place) == []


def test_what_is_not_ours_stays(place: Path) -> None:
    folder = Folder(place)
    (place / "notes.txt").write_text("mine")
    (place / f"{SHARD_PREFIX}of-another-run.safetensors").write_text("theirs")
    ticket = put(folder)
    folder.flush()
    del ticket, folder
    assert names_in(place) == [f"{SHARD_PREFIX}of-another-run.safetensors", "notes.txt"]
    assert (place / "notes.txt").read_text() == "mine"


def test_a_shard_lives_until_the_last_of_its_values_goes(place: Path) -> None:
    folder = Folder(place)
    tickets = [put(folder, number) for number in range(5)]
    folder.flush()
    while tickets:
        assert shards_in(place) == 1
        tickets.pop()
    assert shards_in(place) == 0
    del folder
    assert not place.exists()


def test_a_folder_that_somebody_removed_is_no_trouble(place: Path) -> None:
    folder = Folder(place)
    ticket = put(folder)
    folder.flush()
    for one in place.iterdir():
        one.unlink()
    place.rmdir()
    assert ticket.stored is not None
    assert same(ticket.stored.load(), torch.full((4 * KIB,), 1.0))
    waiting = put(folder, 2)
    with pytest.raises(StorageError, match="create the file"):
        folder.flush()
    place.mkdir()
    folder.flush()
    assert waiting.stored is not None
    assert waiting.digest == digest_of(torch.full((4 * KIB,), 2.0))
    del ticket, waiting, folder
    assert not place.exists()


def test_without_a_place_a_temporary_one_is_taken_and_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Folder()
    path = folder.path
    assert path.parent == tmp_path
    assert str(path) in caplog.text
    ticket = put(folder)
    folder.flush()
    del folder, ticket
    assert not path.exists()


@linux_only("nobody says which file system is in memory")
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no RAM file system is at hand")
def test_a_place_in_memory_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        if memory_file_system(tmp_path) is None:
            Folder(tmp_path / "on disk")
            assert caplog.text == ""
        Folder(f"/dev/shm/diskoffload-test-{os.getpid()}")
    assert "tmpfs" in caplog.text
    assert "memory, not disk" in caplog.text
    assert not Path(f"/dev/shm/diskoffload-test-{os.getpid()}").exists()


# ------------------------------------------------------------------------- putting


def test_values_come_back(place: Path) -> None:
    folder = Folder(place)
    values = {f"layer.{n}": noise(torch.bfloat16, (n, 3), n) for n in range(20)}
    tickets = {name: folder.put(name, value, "zstd") for name, value in values.items()}
    folder.flush()
    (shard,) = folder.shards()
    assert values.keys() <= shard.header.specs.keys()
    for name, ticket in tickets.items():
        assert ticket.stored is not None
        assert same(ticket.stored.load(), values[name])
    assert folder.written_groups == 1
    assert repr(folder) == f"Folder({str(place)!r})"


def test_shards_are_listed_oldest_first(place: Path) -> None:
    folder = Folder(place, group_bytes=1)
    tickets = [put(folder, number, f"t{number}") for number in range(12)]
    folder.flush()
    assert [list(shard.header.specs) for shard in folder.shards()] == [[f"t{n}"] for n in range(12)]
    assert len(tickets) == 12


def test_an_unknown_codec_is_refused_before_anything_is_queued(place: Path) -> None:
    folder = Folder(place)
    with pytest.raises(InvalidInputError, match="unknown compression 'lz4'"):
        folder.put("x", torch.zeros(3), "lz4")
    folder.flush()
    assert folder.shards() == []


def test_a_closed_folder_takes_no_more_and_stays_readable(place: Path) -> None:
    folder = Folder(place)
    ticket = put(folder)
    folder.flush()
    folder.close()
    folder.close()
    assert not folder.is_open
    with pytest.raises(ClosedError, match=r"cannot offload 'w' to .*: it was closed"):
        put(folder)
    with pytest.raises(ClosedError, match=r"cannot write what waits for .*: it was closed"):
        folder.flush()
    assert ticket.stored is not None
    assert same(ticket.stored.load(), torch.full((4 * KIB,), 1.0))
    assert shards_in(place) == 1


def test_threads_that_put_and_list_at_once(place: Path) -> None:
    folder = Folder(place, group_bytes=8 * KIB)
    tickets: dict[int, Ticket] = {}
    failures: list[BaseException] = []
    done = threading.Event()

    def produce(first: int) -> None:
        try:
            for number in range(first, 300, 4):
                tickets[number] = put(folder, number, f"t{number}")
        except BaseException as error:
            failures.append(error)

    def look() -> None:
        try:
            while not done.is_set():
                folder.shards()
        except BaseException as error:
            failures.append(error)

    producers = [threading.Thread(target=produce, args=(first,)) for first in range(4)]
    looker = threading.Thread(target=look)
    for one in (*producers, looker):
        one.start()
    for one in producers:
        one.join()
    folder.flush()
    done.set()
    looker.join()
    assert failures == []
    for number, ticket in tickets.items():
        assert ticket.stored is not None
        assert same(ticket.stored.load(), torch.full((4 * KIB,), float(number)))
    assert len(tickets) == 300


def test_an_edit_after_the_put_is_told_by_the_digest(place: Path) -> None:
    folder = Folder(place)
    tensor = torch.zeros(1000)
    ticket = folder.put("x", tensor, None)
    early = digest_of(tensor)
    tensor.data.add_(1)
    folder.flush()
    assert ticket.stored is not None
    assert ticket.digest == digest_of(ticket.stored.load())
    assert (ticket.digest == early) == (float(ticket.stored.load()[0]) == 0)
    tensor.data.add_(1)
    assert ticket.digest != digest_of(tensor)


def test_mappings_of_offloaded_values_go(place: Path) -> None:
    folder = Folder(place)
    tickets = [put(folder, number) for number in range(3)]
    folder.flush()
    (path,) = (shard.path for shard in folder.shards())
    values = [ticket.stored.mapped() for ticket in tickets if ticket.stored is not None]
    assert mappings_of(path) == 1
    tickets.clear()
    assert not path.exists()
    assert mappings_of(path) == 1
    values.clear()
    assert mappings_of(path) == 0


class Slow(Files):
    """Waits in every write until it is told to go on."""

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        self.started.set()
        self.go.wait(60)
        super().write(fd, data, offset, path)


def test_a_folder_that_only_a_running_write_needs_ends_in_its_writers_thread(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = set(threading.enumerate())
    files = Slow()
    folder = Folder(place, files=files, group_bytes=16 * KIB)
    ticket, dropped = put(folder), folder.put("small", torch.ones(3), None)
    dropped.cancel()
    finished = threading.Event()
    ticket.notify(finished.set)
    assert files.started.wait(60)
    del folder
    files.go.set()
    assert finished.wait(60)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert [str(getattr(one, "exc_value", one)) for one in complaints] == []
    assert ticket.stored is not None
    assert same(ticket.stored.load(), torch.full((4 * KIB,), 1.0))
    assert shards_in(place) == 1
    del ticket
    assert not place.exists()


def test_a_ticket_keeps_its_folder_until_it_is_stored_or_cancelled(place: Path) -> None:
    folder = Folder(place)
    stored, waiting = put(folder, 1), put(folder, 2)
    waiting.cancel()
    assert stored.folder is folder
    assert waiting.folder is None
    folder.flush()
    assert stored.folder is None
    del folder
    assert shards_in(place) == 1
    del stored
    assert not place.exists()


def test_a_ticket_stored_at_once_keeps_no_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write may have ended before ``put`` returns."""
    folder = Folder(place, group_bytes=1)
    start = ThreadPoolExecutor.submit

    def submit_and_wait(*arguments: Any) -> Any:
        future = start(*arguments)
        wait([future])
        return future

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_wait)
    ticket = put(folder)
    later = put(folder)  # has the one before it begun
    assert ticket.stored is not None
    assert later.stored is None
    later.cancel()
    assert ticket.folder is None
