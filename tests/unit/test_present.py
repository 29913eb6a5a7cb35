"""What is taken to be in the page cache, counted in the huge pages in which it is read."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diskoffload.residency.held import Held
from diskoffload.residency.present import Present
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.system.files import Files

MIB = 1 << 20
HUGE = 2 * MIB
# Of the file, in MiB, after a header of less than a page: a ends in the third huge page, and so on.
SIZES = {"a": 5, "b": 1, "c": 4, "d": 3}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, ShardTensor]:
    values = {name: torch.zeros(size * MIB, dtype=torch.uint8) for name, size in SIZES.items()}
    save_file(values, tmp_path / "x.safetensors")
    found = stored_tensors(Shard(tmp_path / "x.safetensors", Files()))
    assert all(isinstance(one, ShardTensor) for one in found.values())
    return {name: one for name, one in found.items() if isinstance(one, ShardTensor)}


def test_a_page_counts_once_and_leaves_with_the_last_on_it(stored: dict[str, ShardTensor]) -> None:
    present, held = Present(), {name: Held(name, None) for name in SIZES}
    start = {name: one.spec.offset for name, one in stored.items()}

    def add(name: str) -> int:
        present.add(held[name], stored[name])
        return present.nbytes

    def remove(name: str) -> tuple[int, int]:
        left = present.remove(held[name])
        assert left is not None
        assert left[0] is stored[name].shard
        return left[1:]

    assert add("a") == add("a") == 3 * HUGE  # pages 0, 1 and 2
    assert add("b") == 4 * HUGE  # it begins in page 2, and ends a header's bytes into page 3
    assert add("d") == 6 * HUGE  # pages 5 and 6
    assert add("c") == 7 * HUGE  # pages 3, 4 and 5
    assert set(present) == set(held.values())
    assert remove("b") == (start["b"], start["c"])  # a and c are on its pages
    assert present.nbytes == 7 * HUGE
    assert remove("a") == (0, 3 * HUGE)
    assert present.nbytes == 4 * HUGE
    assert remove("d") == (start["d"], 7 * HUGE)
    assert present.nbytes == 3 * HUGE
    assert remove("c") == (3 * HUGE, 6 * HUGE)
    assert (present.nbytes, list(present)) == (0, [])


def test_who_is_gone_counts_no_more(stored: dict[str, ShardTensor]) -> None:
    present, held = Present(), {name: Held(name, None) for name in SIZES}
    for name, one in held.items():
        present.add(one, stored[name])
    del held["a"], held["b"], one
    gc.collect()
    assert present.nbytes == 4 * HUGE  # pages 3 to 6
    assert present.remove(held["c"]) is not None
    assert present.nbytes == 2 * HUGE


def test_where_an_entry_was_read_is_kept_though_its_file_is_gone(
    stored: dict[str, ShardTensor],
) -> None:
    present, held = Present(), Held("a", None)
    present.add(held, stored["a"])
    stored.clear()
    gc.collect()
    assert present.remove(held) is None
    assert present.nbytes == 0
