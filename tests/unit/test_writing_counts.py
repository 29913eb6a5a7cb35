"""What it takes to write thousands of small tensors, counted: calls of the system, not seconds."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from shard_files import noise
from writer_bench import KIB, MIB, Bench, check_stored

from diskoffload.cache.disk import DiskCache
from diskoffload.errors import DamagedFileError
from diskoffload.residency.held import State
from diskoffload.residency.resident import Residency
from diskoffload.store import direct_writes, partial_file
from diskoffload.store.direct_writes import STEP_BYTES
from diskoffload.store.folder import Folder
from diskoffload.store.partial_file import PartialFile, partial_path
from diskoffload.system.files import BLOCK_BYTES, Files

pytestmark = pytest.mark.usefixtures("no_leaks")


class Counted(Files):
    """Counts every operation by name, and writes past the page cache by their own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.direct_fds: set[int] = set()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in vars(Files) and callable(found) and not name.startswith("_"):
            with super().__getattribute__("_lock"):
                super().__getattribute__("counts")[name] += 1
        return found

    def open_for_writing_past_cache(self, path: Path) -> int | None:
        fd = super().open_for_writing_past_cache(path)
        if fd is not None:
            self.direct_fds.add(fd)
        return fd

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        if fd not in self.direct_fds:
            super().write(fd, data, offset, path)
            return
        with self._lock:
            self.counts["direct"] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            super().write(fd, data, offset, path)
        finally:
            with self._lock:
                self.at_once -= 1


def put_many(bench: Bench, count: int) -> None:
    tickets = [bench.put(noise(torch.uint8, (16 * KIB,), n), name=f"t{n}") for n in range(count)]
    bench.writer.flush()
    for number in range(0, count, 97):
        check_stored(tickets[number], noise(torch.uint8, (16 * KIB,), number))


def test_small_tensors_share_writes(make: Callable[..., Bench]) -> None:
    files = Counted()
    bench = make(group_bytes=64 * MIB, files=files)
    tickets = [bench.put(torch.full((4 * KIB,), n, dtype=torch.int32)) for n in range(1000)]
    bench.writer.flush()
    found = files.counts
    assert found["create"] == found["rename"] == found["open_for_reading"] == 1
    assert found["write"] == 2 + 2  # the header twice, 16 MiB in steps of 8
    assert found["sync"] == found["read_into"] == 0
    for number in range(0, 1000, 97):
        check_stored(tickets[number], torch.full((4 * KIB,), number, dtype=torch.int32))


def test_many_small_tensors_go_past_the_page_cache(make: Callable[..., Bench]) -> None:
    files = Counted()
    bench = make(group_bytes=128 * MIB, files=files)
    put_many(bench, 2500)  # 39 MiB
    if not files.direct_fds and not files.counts["direct"]:
        pytest.skip("this file system has no direct writes")
    assert files.counts["direct"] == -(-2500 * 16 * KIB // STEP_BYTES)
    # The header twice, and the parts of blocks where the tensors begin and end.
    assert files.counts["write"] - files.counts["direct"] <= 4
    assert files.counts["sync"] == 0


def test_a_group_wakes_its_thread_once(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(group_bytes=4 * MIB)
    submitted: list[object] = []
    submit = ThreadPoolExecutor.submit

    def counted(self: ThreadPoolExecutor, *args: Any, **kwargs: Any) -> Any:
        submitted.append(args)
        return submit(self, *args, **kwargs)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    put_many(bench, 600)
    assert len(submitted) == bench.writer.written_groups == 3


def test_what_is_meanwhile_happens_beside_the_next_write(make: Callable[..., Bench]) -> None:
    class Waits(Files):
        called = threading.Event()

        def create(self, path: Path) -> int:
            # The second file is begun and not ended before the first one is looked at.
            assert path.name.startswith("0000") or self.called.wait(60)
            return super().create(path)

    bench = make(group_bytes=MIB, files=Waits())
    seen: list[list[bool]] = []
    tickets = []

    def look() -> None:
        seen.append([ticket.stored is not None for ticket in tickets])
        Waits.called.set()

    tickets = [bench.put(torch.ones(MIB // 4), name=f"t{n}") for n in range(2)]
    bench.writer.flush(look)
    assert seen == [[True, False]]
    assert all(ticket.stored is not None for ticket in tickets)


def test_a_file_that_somebody_changes_at_once_is_named(make: Callable[..., Bench]) -> None:
    class Changes(Files):
        changes = True

        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if self.changes:
                os.truncate(target, 10)

    files = Changes()
    bench = make(files=files)
    ticket = bench.put(torch.ones(3))
    with pytest.raises(DamagedFileError, match="changed as soon as it was written"):
        bench.writer.flush()
    assert bench.names() == []
    files.changes = False
    bench.writer.flush()
    check_stored(ticket, torch.ones(3))


def test_syncing_many_asks_for_each_file_once(tmp_path: Path) -> None:
    """Neither is a file mapped or looked at for each of its tensors, nor laid beneath them."""
    counts = []
    for count in (50, 500):
        files, residency = Counted(), Residency()
        folder = Folder(tmp_path / str(count), files=files)
        cache = DiskCache("cpu", offload_dir=folder, residency=residency)
        for number in range(count):
            cache[f"p{number}"] = torch.nn.Parameter(torch.full((64,), float(number)))
        before = files.counts.copy()
        cache.sync()
        counts.append(files.counts - before)
        assert counts[-1]["map"] == counts[-1]["create"] == 1
        assert {held.state for held in residency.known()} == {State.VACANT}
        assert len(folder.shards()) == 1
        for number in range(count):
            assert float(cache[f"p{number}"].detach()[3]) == number
        assert (files.counts - before)["map"] == 1
        folder.close()
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------ in any order


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_parts_may_come_in_any_order(
    tmp_path: Path, past_cache: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of parts that follow each other, runs that go on elsewhere, and syncs between them."""
    monkeypatch.setattr(partial_file, "_DIRECT_FROM_BYTES", 0)
    monkeypatch.setattr(partial_file, "_LEAST_DIRECT_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(partial_file, "_WRITE_STEP_BYTES", 5 * BLOCK_BYTES + 3)
    for module in (partial_file, direct_writes):
        monkeypatch.setattr(module, "STEP_BYTES", 8 * BLOCK_BYTES)
    chance = random.Random(seed)
    wanted = chance.randbytes(3_000_000)
    cuts = sorted(chance.sample(range(len(wanted)), 60))
    runs = list(zip([0, *cuts], [*cuts, len(wanted)], strict=True))
    chance.shuffle(runs)
    files = Files(may_write_past_cache=past_cache)
    path = tmp_path / "x"
    fd = files.create(partial_path(path))
    files.set_size(fd, len(wanted), path)
    file = PartialFile(path, files, fd, len(wanted))
    for start, stop in runs:
        place = start
        while place < stop:
            end = min(stop, place + chance.choice((1, 700, BLOCK_BYTES, 9 * BLOCK_BYTES, 200_000)))
            digest = xxhash.xxh3_128()
            file.write(memoryview(wanted)[place:end], place, digest)
            assert digest.digest() == xxhash.xxh3_128_digest(wanted[place:end])
            place = end
            if chance.random() < 0.1:
                file.sync_data()
                assert partial_path(path).read_bytes()[start:place] == wanted[start:place]
    file.publish(durable=chance.random() < 0.5)
    assert path.read_bytes() == wanted
