"""The queue to disk under faults, threads and interrupts: nothing is lost or unsaid."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shard_files import noise
from writer_bench import KIB, MIB, Bench, check_stored

from diskoffload.errors import (
    NoSpaceError,
    StorageError,
)
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.files import Files

pytestmark = pytest.mark.usefixtures("no_leaks")


# ---------------------------------------------------------------------------- faults


@pytest.fixture
def gone(tmp_path: Path) -> Path:
    """Give a place that is not there yet; making it removes the cause of every fault."""
    return tmp_path / "disk"


def test_an_error_surfaces_and_nothing_is_lost(make: Callable[..., Bench], gone: Path) -> None:
    bench = make(group_bytes=16 * KIB, folder=gone)
    values = [noise(torch.uint8, (16 * KIB,), seed) for seed in range(12)]
    tickets: list[Ticket] = []
    errors: list[StorageError] = []
    while len(tickets) < len(values):
        try:
            tickets.append(bench.put(values[len(tickets)]))
        except StorageError as error:
            errors.append(error)
            if len(errors) == 3:
                gone.mkdir()
    assert len(errors) >= 3
    assert all(str(gone) in str(error) for error in errors)
    bench.writer.flush()
    for ticket, value in zip(tickets, values, strict=True):
        check_stored(ticket, value)
    assert bench.tensor_count() == len(values)  # what was refused was not queued


def test_an_error_surfaces_at_every_flush_until_its_cause_is_gone(
    make: Callable[..., Bench], gone: Path
) -> None:
    bench = make(folder=gone)
    value = noise(torch.bfloat16, (100, 30))
    tickets = [bench.put(value, name=str(number)) for number in range(5)]
    for _ in range(3):
        with pytest.raises(StorageError, match="create the file"):
            bench.writer.flush()
        assert all(ticket.stored is None for ticket in tickets)
    gone.mkdir()
    bench.writer.flush()
    for ticket in tickets:
        check_stored(ticket, value)
    assert bench.names() == ["0003.safetensors"]


def test_a_full_disk_surfaces_and_nothing_is_lost(
    make: Callable[..., Bench], small_disk: Path
) -> None:
    bench = make(folder=small_disk, group_bytes=256 * KIB)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(900 * KIB))
    value = noise(torch.uint8, (256 * KIB,))
    ticket = bench.put(value)
    with pytest.raises(NoSpaceError, match="free some space"):
        bench.writer.flush()
    assert bench.names() == ["ballast"]
    ballast.unlink()
    bench.writer.flush()
    check_stored(ticket, value)
    assert bench.names() == ["0001.safetensors"]


class OpensNothing(Files):
    """Cannot open a file it has written, while ``broken``."""

    broken = True

    def open_for_reading(self, path: Path) -> int:
        if self.broken:
            raise StorageError(24, "Too many open files", str(path))
        return super().open_for_reading(path)


def test_a_file_that_cannot_be_opened_again_is_not_left(make: Callable[..., Bench]) -> None:
    files = OpensNothing()
    bench = make(files=files)
    ticket = bench.put(torch.ones(3))
    with pytest.raises(StorageError, match="Too many open files"):
        bench.writer.flush()
    assert bench.names() == []
    files.broken = False
    bench.writer.flush()
    check_stored(ticket, torch.ones(3))
    assert len(bench.names()) == 1


class Slow(Files):
    """Waits in every write until it is told to go on."""

    def __init__(self) -> None:
        self.started, self.go = threading.Event(), threading.Event()

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        self.started.set()
        if not self.go.wait(60):
            raise StorageError(62, "nobody told to go on", str(path))
        super().write(fd, data, offset, path)


def test_an_interrupted_flush_loses_nothing_and_writes_nothing_twice(
    make: Callable[..., Bench],
) -> None:
    files = Slow()
    bench = make(files=files)
    tickets = [bench.put(torch.full((9,), float(n)), name=str(n)) for n in range(3)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench.writer.flush()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    files.go.set()
    bench.writer.flush()
    for number, ticket in enumerate(tickets):
        check_stored(ticket, torch.full((9,), float(number)))
    assert bench.names() == ["0000.safetensors"]


def test_what_waits_in_memory_is_bounded(make: Callable[..., Bench]) -> None:
    files = Slow()
    bench = make(group_bytes=KIB, files=files)
    tickets: list[Ticket] = []

    def produce() -> None:
        for number in range(20):
            tickets.append(bench.put(torch.full((KIB,), number, dtype=torch.uint8)))

    producer = threading.Thread(target=produce)
    producer.start()
    assert files.started.wait(60)
    producer.join(0.5)
    assert producer.is_alive()  # it waits, rather than fill the memory
    assert len(tickets) <= 3
    files.go.set()
    producer.join(60)
    bench.writer.flush()
    for number, ticket in enumerate(tickets):
        check_stored(ticket, torch.full((KIB,), number, dtype=torch.uint8))
    assert len(tickets) == 20


# ---------------------------------------------------------------------------- concurrency


def test_threads_that_put_at_once(make: Callable[..., Bench]) -> None:
    bench = make(group_bytes=32 * KIB)
    tickets: dict[int, Ticket] = {}

    def produce(first: int) -> None:
        for number in range(first, 400, 4):
            value = torch.full((KIB,), number, dtype=torch.int32)
            tickets[number] = bench.put(value, name=f"t{number % 7}")
            if number % 50 == first:
                bench.writer.flush()

    threads = [threading.Thread(target=produce, args=(first,)) for first in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    bench.writer.flush()
    assert len(tickets) == 400
    for number, ticket in tickets.items():
        check_stored(ticket, torch.full((KIB,), number, dtype=torch.int32))
    assert bench.tensor_count() == 400


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_the_digest_is_of_the_stored_bytes_whoever_writes_meanwhile(
    make: Callable[..., Bench], codec: str | None
) -> None:
    bench = make(group_bytes=1)
    tensor = torch.zeros(20 * MIB, dtype=torch.uint8)
    stop = threading.Event()

    def scribble() -> None:
        for number in itertools.count(1):
            tensor[:: 64 * KIB] = number % 251
            if stop.is_set():
                return

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        tickets = [bench.put(tensor, codec) for _ in range(4)]
        bench.writer.flush()
    finally:
        stop.set()
        scribbler.join()
    for ticket in tickets:
        assert ticket.stored is not None
        assert digest_of(ticket.stored.load()) == ticket.digest
    tensor.fill_(77)
    assert all(digest_of(tensor) != ticket.digest for ticket in tickets)


class EditsMeanwhile(Files):
    """Changes a tensor in place after its first bytes were written."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.writes = tensor, 0

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        super().write(fd, data, offset, path)
        self.writes += 1
        if self.writes == 2:  # the header and the first step
            self.tensor.data.fill_(9)


def test_an_edit_during_the_write_is_told_by_the_digest(make: Callable[..., Bench]) -> None:
    tensor = torch.zeros(20 * MIB, dtype=torch.uint8)
    bench = make(files=EditsMeanwhile(tensor))
    ticket = bench.put(tensor)
    bench.writer.flush()
    assert ticket.stored is not None
    stored = ticket.stored.load()
    assert (int(stored[0]), int(stored[-1])) == (0, 9)  # a mixture that nobody ever assigned
    assert ticket.digest == digest_of(stored)
    assert ticket.digest != digest_of(tensor)


def test_digests_are_of_values_not_of_layouts() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    assert digest_of(value.t().contiguous().t()) == digest_of(value)
    assert digest_of(torch.nn.Parameter(value)) == digest_of(value)
    assert digest_of(value.t()) != digest_of(value)
    changed = value.clone()
    changed[2, 3] = -11.0
    assert digest_of(changed) != digest_of(value)
    assert len(digest_of(torch.empty(0))) == 16


# ---------------------------------------------------------------------------- closing


def test_closing_drops_what_waits_and_ends_the_thread(bench: Bench) -> None:
    before = set(threading.enumerate())
    first = bench.put(torch.ones(3))
    bench.writer.flush()
    bench.put(torch.ones(3))
    bench.writer.close()
    bench.writer.close()
    assert bench.names() == ["0000.safetensors"]
    check_stored(first, torch.ones(3))
    assert set(threading.enumerate()) <= before


def test_closing_lets_a_running_write_end(make: Callable[..., Bench]) -> None:
    files = Slow()
    bench = make(group_bytes=40, files=files)
    tickets = [bench.put(torch.ones(10)), bench.put(torch.ones(3))]
    assert files.started.wait(60)
    threading.Timer(0.2, files.go.set).start()
    bench.writer.close()
    check_stored(tickets[0], torch.ones(10))
    assert tickets[1].stored is None  # it had not begun
    assert bench.names() == ["0000.safetensors"]
