"""What a read of a small streamed weight costs must not grow with how many lie beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency import streaming as streaming_module
from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held

LAYERS, WIDTH = 500, 256  # a quarter of a MiB each: the least that is streamed


def chain() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the entries that are looked at: as coming next, and as ones that may leave."""
    counted: Counter[str] = Counter()
    expected, leaving_first = Foresight.expected, Foresight.leaving_first

    def counting(self: Foresight) -> Iterator[Held]:
        for held in expected(self):
            counted["coming"] += 1
            yield held

    def judging(self: Foresight, entries: Iterable[Held]) -> list[Held]:
        found = leaving_first(self, entries)
        counted["leaving"] += len(found)
        return found

    monkeypatch.setattr(Foresight, "expected", counting)
    monkeypatch.setattr(Foresight, "leaving_first", judging)
    return counted


@pytest.mark.parametrize("budget_bytes", [1 << 30, 60 << 20])
@pytest.mark.parametrize("digested", [False, True])
def test_a_read_looks_at_few_of_the_others(
    tmp_path: Path,
    looked_at: Counter[str],
    budget_bytes: int,
    digested: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if digested:  # as where the kernel tells of no edits
        monkeypatch.setattr(streaming_module, "write_watch", lambda: None)
    plain = chain()
    (tmp_path / "c").mkdir()
    save_file(plain.state_dict(), tmp_path / "c" / "model.safetensors")
    with torch.device("meta"):
        bare = chain()
    model = diskoffload.open_checkpoint(
        tmp_path / "c",
        model=bare,
        offload_dir=tmp_path / "o",
        max_memory=budget_bytes,
        mode="streamed",
    )
    for _ in range(2):
        looked_at.clear()
        for mine, theirs in zip(model, plain, strict=True):
            assert torch.equal(mine.weight, theirs.weight)
        del mine, theirs
        assert looked_at["coming"] <= 20 * LAYERS
        assert looked_at["leaving"] <= 36 * LAYERS
        residency = model[0]._parameters.residency
        # What is told without a sum is what the sum would be.
        streaming = residency._streaming
        with residency.lock:
            assert streaming.ahead_bytes == sum(one.nbytes for one in streaming._fills.values())
