"""Tensors that are looked at once, band by band: what comes, in which memory, and what stays."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linux_only import linux_only
from page_cache import cached_pages
from safetensors.torch import save_file

from diskoffload.errors import DamagedFileError
from diskoffload.store import bands, buffers
from diskoffload.store.bands import through
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.system.files import Files
from diskoffload.system.memory import Memory

MIB = 1 << 20
SHAPES = {"a": (96, 128, 64), "b": (7,), "c": (3000, 333), "d": (0, 5), "e": (2048, 512)}


class Untold(Files):
    """Is never told what is in the page cache, as whoever does not own a file."""

    def tells_what_is_cached(self, fd: int, path: Path) -> bool:
        return False


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def opened(folder: Path, files: Files | None = None, pad: int = 0) -> list[ShardTensor]:
    """Write and open a checkpoint whose tensors begin ``pad`` bytes later than usually."""
    path = folder / "x.safetensors"
    save_file(values(), path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(
        (length + pad).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * pad + raw[8 + length :]
    )
    found = stored_tensors(Shard(path, files or Files()))
    return [one for one in found.values() if isinstance(one, ShardTensor)]


def cut(tensor: ShardTensor) -> list[ShardTensor]:
    return tensor.bands(max(1, MIB // (tensor.nbytes // max(1, tensor.shape[0]) or 1)))


def leave_cache(path: Path) -> None:
    files = Files()
    with files.writing(path) as fd:
        files.sync(fd, path)
        files.drop_from_cache(fd, 0, 0)
    if any(cached_pages(path)):
        pytest.skip("this file system keeps in memory what it is told to drop")


def gathered(tensors: list[ShardTensor], most_bytes: int = 4 * MIB) -> dict[str, torch.Tensor]:
    found = {}
    for tensor, parts in through(tensors, cut, most_bytes):
        rows = []
        for band in parts:
            assert band.value().data_ptr() % tensor.dtype.itemsize == 0
            rows.append(band.value().clone())
        found[tensor.spec.name] = torch.cat(rows) if rows else torch.empty(tensor.shape)
    return found


def assert_same(got: dict[str, torch.Tensor]) -> None:
    expected = values()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the buffers that are taken from the system, and their bytes at the most."""
    counts = {"buffers": 0, "now_bytes": 0, "most_bytes": 0}
    anonymous = buffers.anonymous

    def give_back(nbytes: int) -> None:
        counts["now_bytes"] -= nbytes

    def counted(nbytes: int) -> Memory:
        memory = anonymous(nbytes)
        counts["buffers"] += 1
        counts["now_bytes"] += nbytes
        counts["most_bytes"] = max(counts["most_bytes"], counts["now_bytes"])
        weakref.finalize(memory, give_back, nbytes)
        return memory

    monkeypatch.setattr(buffers, "anonymous", counted)
    yield counts
    until_seconds = time.monotonic() + 20
    while counts["now_bytes"]:  # what was being read as it was given up
        assert time.monotonic() < until_seconds
        time.sleep(0.01)
        gc.collect()


@pytest.mark.parametrize("pad", [0, 1, 8])
@pytest.mark.parametrize("files", [Files(), Files(may_read_past_cache=False), Untold()], ids=repr)
def test_every_band_comes_in_its_order(disk_path: Path, files: Files, pad: int) -> None:
    assert_same(gathered(opened(disk_path, files, pad)))


def test_few_buffers_are_used_again(disk_path: Path, made: dict[str, int]) -> None:
    tensors = opened(disk_path, Untold())
    count = sum(len(cut(one)) for one in tensors)
    assert_same(gathered(tensors, most_bytes=4 * MIB))
    assert made["most_bytes"] <= 4 * MIB
    assert made["buffers"] <= 8 < count  # of three sizes


def test_one_that_is_larger_than_all_may_take_comes_alone(
    disk_path: Path, made: dict[str, int]
) -> None:
    assert_same(gathered(opened(disk_path, Untold()), most_bytes=1))
    assert made["most_bytes"] < 2 * MIB


def test_the_next_are_on_their_way_meanwhile(disk_path: Path, made: dict[str, int]) -> None:
    coming = through(opened(disk_path, Untold()), cut, 4 * MIB)
    _, parts = next(coming)
    next(parts)
    assert made["buffers"] == 3
    coming.close()


@linux_only("direct reads")
def test_what_is_not_cached_leaves_nothing_there(disk_path: Path) -> None:
    tensors = opened(disk_path)
    path = disk_path / "x.safetensors"
    leave_cache(path)
    assert_same(gathered(tensors))
    # Small ones are mapped, and what is read ahead of them.
    small = {i for one in tensors for i in _pages(one) if one.nbytes < bands._LEAST_BYTES}
    cached = {i for i, is_cached in enumerate(cached_pages(path)) if is_cached}
    assert len(cached - small) * 4096 < MIB


def _pages(tensor: ShardTensor) -> range:
    spec = tensor.spec
    return range(spec.offset // 4096, (spec.offset + max(0, spec.nbytes - 1)) // 4096 + 1)


@linux_only("asking what is in the page cache")
def test_what_is_cached_is_looked_at_there_and_stays(disk_path: Path, made: dict[str, int]) -> None:
    tensors = opened(disk_path)
    assert all(cached_pages(disk_path / "x.safetensors"))
    assert_same(gathered(tensors))
    assert made["buffers"] == 0
    assert all(cached_pages(disk_path / "x.safetensors"))


def test_what_somebody_keeps_is_not_written_over(disk_path: Path) -> None:
    kept: dict[str, list[torch.Tensor]] = {}
    for tensor, parts in through(opened(disk_path, Untold()), cut, 3 * MIB):
        kept[tensor.spec.name] = [band.value() for band in parts]
    for name, value in values().items():
        assert torch.equal(torch.cat(kept[name]) if kept[name] else value, value)


def test_bands_that_nobody_looked_at_are_passed_over(disk_path: Path) -> None:
    expected, seen = values(), []
    for tensor, parts in through(opened(disk_path, Untold()), cut, 4 * MIB):
        first = next(parts, None)
        if first is not None:
            part = first.value()
            assert torch.equal(part, expected[tensor.spec.name][: len(part)])
        seen.append(tensor.spec.name)
    assert sorted(seen) == sorted(expected)


def test_a_file_that_was_changed_is_named(disk_path: Path) -> None:
    tensors = opened(disk_path, Untold())
    path = disk_path / "x.safetensors"
    coming = through(tensors, cut, MIB)
    _, parts = next(coming)
    next(parts).value()
    path.write_bytes(path.read_bytes()[:-MIB])
    with pytest.raises(DamagedFileError, match="was changed while it was open"):
        assert [band.value().sum() for band in parts]


@linux_only("asking what is in the page cache")
def test_the_kernel_tells_the_owner_only(disk_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tensor, *_) = opened(disk_path)
    assert tensor.shard.is_cached(tensor.spec)
    uid = (disk_path / "x.safetensors").stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: uid + 1)
    assert not tensor.shard.is_cached(tensor.spec)


def test_a_tensor_is_cut_into_all_of_its_rows(disk_path: Path) -> None:
    expected: Any = values()
    for tensor in opened(disk_path):
        value = expected[tensor.spec.name]
        for rows in (1, 2, 7, 1000, 10_000):
            if rows < 7 and len(value) > 100:
                continue
            parts = [band.load() for band in tensor.bands(rows)]
            assert all(len(part) == rows for part in parts[:-1])
            assert torch.equal(torch.cat(parts) if parts else torch.empty(value.shape), value)
        assert torch.equal(tensor.flat().load(), value.view(-1))
