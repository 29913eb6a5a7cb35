"""What is read ahead, when the order in which weights are used changes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency import streaming as streaming_module
from diskoffload.store.fills import Fill, Filling

LAYERS, WIDTH = 64, 512  # 1 MiB each
BUDGET_BYTES = 12 << 20


class Reads:
    """A streamed model, and counts of what its reads took."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, last_rows: int = WIDTH
    ) -> None:
        self.plain = self._chain(last_rows)
        (folder / "c").mkdir()
        save_file(self.plain.state_dict(), folder / "c" / "model.safetensors")
        with torch.device("meta"):
            bare = self._chain(last_rows)
        self.model: Any = diskoffload.open_checkpoint(
            folder / "c",
            model=bare,
            offload_dir=folder / "o",
            max_memory=BUDGET_BYTES,
            mode="streamed",
        )
        self.residency = self.model[0]._parameters.residency
        self.from_disk = self.most_bytes = 0
        begin = Filling.begin

        def counting(filling: Filling, stored: Any, buffers: Any) -> Any:
            self.from_disk += 1
            self.most_bytes = max(self.most_bytes, self.residency._used_bytes() + stored.nbytes)
            return begin(filling, stored, buffers)

        monkeypatch.setattr(Filling, "begin", counting)

    @staticmethod
    def _chain(last_rows: int) -> torch.nn.Sequential:
        rows = [WIDTH] * (LAYERS - 1) + [last_rows]
        return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, one, bias=False) for one in rows))

    def read(self, numbers: Iterable[int]) -> tuple[int, int]:
        """Read weights; give how many were waited for, and how many were read from disk."""
        loaded, self.from_disk = self.residency.loaded_count, 0
        for number in numbers:
            assert torch.equal(self.model[number].weight, self.plain[number].weight)
        assert self.most_bytes <= BUDGET_BYTES
        return self.residency.loaded_count - loaded, self.from_disk


@pytest.fixture(params=["told", "digested"])
def reads(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    if request.param == "digested":  # as where the kernel tells of no edits
        monkeypatch.setattr(streaming_module, "write_watch", lambda: None)
    return Reads(tmp_path, monkeypatch)


def test_what_is_used_no_more_leaves_also_if_it_was_only_read_ahead(reads: Reads) -> None:
    for _ in range(2):
        reads.read(range(LAYERS))
    reads.read(range(0, LAYERS, 2))  # each time the next one was expected, and is not used again
    few = [0, 2, 4, 6]
    for _ in range(2):
        reads.read(few)
    assert reads.read(few) == (0, 0)


@pytest.mark.parametrize("layers", [14, 24])
def test_no_more_than_one_beside_the_one_in_use_takes_the_place_of_what_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    weight_bytes = WIDTH * WIDTH * 4
    # As 36 MiB are to weights of 16.
    monkeypatch.setattr(streaming_module, "_IN_PLACE_BYTES", weight_bytes * 9 // 4)
    reads = Reads(tmp_path, monkeypatch)
    for _ in range(3):
        reads.read(range(layers))
    passes = 8
    read = sum(reads.read(range(layers))[1] for _ in range(passes))
    kept = BUDGET_BYTES // (weight_bytes + 4096)  # a buffer has room for a tensor anywhere
    assert layers - kept <= read / passes <= layers - kept + 2
    # While one is used that stays, two are.
    on_their_way = [
        len(reads.residency._streaming._fills)
        for number in [*range(layers)] * 2
        if reads.read([number])[0] == 0
    ]
    assert max(on_their_way) == 2


def test_a_new_order_is_read_ahead_as_the_old_one_was(reads: Reads) -> None:
    for _ in range(2):
        reads.read(range(LAYERS))
    every_other = range(0, LAYERS, 2)
    for _ in range(3):
        reads.read(every_other)
    found = [reads.read(every_other) for _ in range(4)]
    # A few are on their way, or in use; digests are there sooner or later.
    read = len(every_other) - BUDGET_BYTES // (WIDTH * WIDTH * 4) + 4
    assert sum(from_disk for _, from_disk in found) <= 4 * read + 4
    assert sum(waited_for for waited_for, _ in found) <= 4 * read + 4


def test_a_random_order_costs_few_reads_for_nothing(reads: Reads) -> None:
    for _ in range(2):
        reads.read(range(LAYERS))
    chosen = random.Random(0)
    order = list(range(LAYERS))
    for _ in range(2):
        chosen.shuffle(order)
        reads.read(order)
    chosen.shuffle(order)
    waited_for, from_disk = reads.read(order)
    assert from_disk <= 1.2 * waited_for


def test_routing_leaves_the_cache_as_good_as_it_was(reads: Reads) -> None:
    """Eight layers of a weight that is always used and seven experts, two of which are picked."""
    fixed = [8 * layer + place for layer in range(8) for place in (0, 1, 2)]
    for _ in range(3):
        reads.read(fixed)
    before = sum(reads.read(fixed)[1] for _ in range(4))
    chosen = random.Random(0)
    waited_for = from_disk = count = 0
    for _ in range(20):
        picked = [
            8 * layer + place
            for layer in range(8)
            for place in (0, *sorted(chosen.sample(range(1, 8), 2)))
        ]
        found = reads.read(picked)
        waited_for, from_disk, count = waited_for + found[0], from_disk + found[1], count + 24
    assert waited_for <= 0.85 * count  # those always used are kept, for the most part
    assert from_disk <= count
    for _ in range(5):
        reads.read(fixed)
    assert sum(reads.read(fixed)[1] for _ in range(4)) <= 1.2 * before


def test_what_was_read_ahead_leaves_for_a_large_one_that_was_not_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(tmp_path, monkeypatch, last_rows=WIDTH * 11)
    for _ in range(2):
        reads.read(range(LAYERS - 1))
    streaming, were_ahead = reads.residency._streaming, 0
    for number in range(5, 60, 10):
        reads.read([number, number + 1])
        with reads.residency.lock:
            streaming.quiesce()
            were_ahead += len(streaming._fills)
        reads.read([LAYERS - 1])  # all but 1 MiB of the budget, which is kept to
    assert were_ahead


def test_what_is_waited_for_is_not_given_up_as_it_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(tmp_path, monkeypatch)
    go, read = threading.Event(), Fill.read

    def held_up(fill: Fill, *arguments: Any) -> bool:
        assert go.wait(60)
        return read(fill, *arguments)

    monkeypatch.setattr(Fill, "read", held_up)
    streaming, held = reads.residency._streaming, reads.model[5]._parameters._held["weight"]
    seen: list[Any] = []

    def meanwhile() -> None:
        go.set()
        streaming.quiesce()
        seen.extend([streaming.ahead(), streaming.give_up(held)])

    with reads.residency.lock:
        value, _ = streaming.take(held, held.backing.streamable, meanwhile)
        assert streaming.ahead_bytes == 0
    assert seen == [[], 0]
    assert torch.equal(value, reads.plain[5].weight)
