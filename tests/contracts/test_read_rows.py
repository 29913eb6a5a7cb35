"""Some rows of an entry, wherever its value is: no more is read and decoded than must be."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import diskoffload
from diskoffload.residency.held import State
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.shard import Shard

ROWS, COLUMNS = 5000, 1024  # a chunk of 1 MiB has 512 of its rows in bfloat16
VALUE = (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


class Reads:
    """Counts what is read and decoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self.chunks: list[int] = []
        read, unpack = Shard.read_into, EncodedTensor.unpack_chunk
        lock = threading.Lock()

        def reading(shard: Shard, spec: Any, target: memoryview, start: int = 0) -> None:
            with lock:
                self.nbytes += len(target)
            read(shard, spec, target, start)

        def unpacking(tensor: EncodedTensor, number: int, *rest: Any) -> None:
            with lock:
                self.chunks.append(number)
            unpack(tensor, number, *rest)

        patch.setattr(Shard, "read_into", reading)
        patch.setattr(EncodedTensor, "unpack_chunk", unpacking)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    yield Reads(monkeypatch)
    monkeypatch.undo()


@pytest.fixture
def offloaded(tmp_path: Path) -> Iterator[Callable[..., diskoffload.DiskCache]]:
    made: list[diskoffload.DiskCache] = []

    def one(value: torch.Tensor, **options: Any) -> diskoffload.DiskCache:
        cache = diskoffload.DiskCache("cpu", offload_dir=tmp_path / "off", **options)
        cache["w"] = value.clone()
        cache.sync()
        cache.residency.make_room(0)
        made.append(cache)
        return cache

    yield one
    made.clear()


@pytest.mark.parametrize(
    ("start", "stop", "chunks"),
    [
        (0, 1, [0]),
        (700, 900, [1]),
        (0, 512, [0]),
        (512, 1024, [1]),
        (511, 513, [0, 1]),
        (600, 2000, [1, 2, 3]),
        (ROWS - 1, ROWS, [9]),
        (0, ROWS, [*range(10)]),
        (7, 7, []),
    ],
)
def test_only_the_chunks_of_the_rows_are_read_and_decoded(
    offloaded: Callable[..., diskoffload.DiskCache],
    reads: Reads,
    start: int,
    stop: int,
    chunks: list[int],
) -> None:
    cache = offloaded(VALUE, compression="zstd")
    found = cache.read_rows("w", start, stop)
    assert torch.equal(found, VALUE[start:stop])
    assert (found.shape, found.dtype) == ((stop - start, COLUMNS), torch.bfloat16)
    assert sorted(reads.chunks) == chunks
    assert reads.nbytes <= len(chunks) * (1 << 20) * 0.68
    assert cache._held["w"].state is State.VACANT  # type: ignore[union-attr]


def test_of_what_is_not_compressed_only_the_rows_bytes_are_read(
    offloaded: Callable[..., diskoffload.DiskCache], reads: Reads
) -> None:
    cache = copy.deepcopy(offloaded(VALUE))  # nothing of the copy was mapped yet
    assert torch.equal(cache.read_rows("w", 100, 130), VALUE[100:130])
    assert reads.nbytes == 30 * COLUMNS * 2


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_edits_are_in_the_rows_and_the_rows_are_no_edit(
    offloaded: Callable[..., diskoffload.DiskCache], compression: str | None
) -> None:
    cache = offloaded(VALUE, compression=compression)
    weight = cache["w"]
    assert weight is not None
    weight.data[3] = 7
    rows = cache.read_rows("w", 2, 5)
    assert rows.tolist() == weight[2:5].tolist()
    rows.zero_()
    assert cache.read_rows("w", 3, 4).float().mean() == 7
    del weight, rows
    cache.sync()
    cache.residency.make_room(0)
    assert cache.read_rows("w", 3, 4).float().mean() == 7
    assert torch.equal(cache.read_rows("w", 4, 9), VALUE[4:9])


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_of_a_transposed_weight_and_of_a_view(tmp_path: Path, compression: str | None) -> None:
    module = torch.nn.Module()
    whole = torch.arange(60_000.0).reshape(200, 300)
    module.register_buffer("turned", whole.clone().t())
    module.register_buffer("whole", whole)
    module.register_buffer("part", whole[50:100])
    diskoffload.offload_module(
        module, "cpu", "disk", offload_dir=tmp_path / "off", compression=compression
    )
    cache: Any = module._buffers
    for _ in range(2):
        assert torch.equal(cache.read_rows("turned", 10, 20), whole.t()[10:20])
        assert torch.equal(cache.read_rows("part", 10, 20), whole[60:70])
        cache.sync()
        cache.residency.make_room(0)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, ROWS + 1)])
def test_rows_that_are_not_there_are_refused(
    offloaded: Callable[..., diskoffload.DiskCache], start: int, stop: int
) -> None:
    cache = offloaded(VALUE)
    with pytest.raises(
        diskoffload.InvalidInputError, match=rf"rows {start} to {stop} of 'w': it has the shape"
    ):
        cache.read_rows("w", start, stop)


def test_entries_that_have_no_rows_are_refused(tmp_path: Path) -> None:
    cache = diskoffload.DiskCache("cpu", offload_dir=tmp_path / "off")
    cache["scalar"] = torch.tensor(2.0)
    cache["none"] = None
    for name, found in (("scalar", r"it has the shape \(\)"), ("none", "it is None")):
        with pytest.raises(diskoffload.InvalidInputError, match=found):
            cache.read_rows(name, 0, 0)
    with pytest.raises(KeyError):
        cache.read_rows("other", 0, 0)
