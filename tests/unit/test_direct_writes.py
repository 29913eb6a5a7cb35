"""Large tensors are written past the page cache; what is in the file is the same."""

from __future__ import annotations

import errno
import mmap
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from page_cache import cached_pages
from safetensors.torch import load_file

from diskoffload.errors import StorageError
from diskoffload.store import partial_file
from diskoffload.store.shard import Shard
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.system.files import BLOCK_BYTES, Files
from diskoffload.system.memory import tensor_bytes

SIZES = (5, BLOCK_BYTES, 3 * BLOCK_BYTES + 17, 8_400_000, 1, 20_000_003, 64)


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_file, "_DIRECT_FROM_BYTES", 0)
    monkeypatch.setattr(partial_file, "_LEAST_DIRECT_BYTES", BLOCK_BYTES)


class Recorded(Files):
    """Knows which bytes went which way, and may fail one direct write."""

    def __init__(self, fails_at: int = -1, **may: bool) -> None:
        super().__init__(**may)
        self.direct_fds: set[int] = set()
        self.opened = 0
        self.direct_bytes = self.buffered_bytes = 0
        self._fails_at = fails_at

    def open_for_writing_past_cache(self, path: Path) -> int | None:
        fd = super().open_for_writing_past_cache(path)
        if fd is None:
            pytest.skip(f"{path} is on a file system without direct writes")
        self.direct_fds.add(fd)
        self.opened += 1
        return fd

    def close(self, fd: int) -> None:
        self.direct_fds.discard(fd)
        super().close(fd)

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        if fd not in self.direct_fds:
            self.buffered_bytes += len(data)
        else:
            if 0 <= self._fails_at <= self.direct_bytes:
                raise StorageError(errno.EIO, "a fault made by the test", str(path))
            self.direct_bytes += len(data)
        super().write(fd, data, offset, path)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"t{n}": torch.randint(256, (n,), dtype=torch.uint8) for n in SIZES}


def write(path: Path, files: Files, pieces: int = 1) -> None:
    values = tensors()
    planned = [(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    with ShardWriter(path, planned, files) as writer:
        for name, value in values.items():
            data = tensor_bytes(value)
            step = -(-len(data) // pieces)
            for begin in range(0, len(data), step):
                writer.write_part(name, data[begin : begin + step])
        writer.publish()


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_file_is_the_same_whichever_way_it_is_written(tmp_path: Path, pieces: int) -> None:
    direct, buffered = Recorded(), Files(may_write_past_cache=False)
    write(tmp_path / "direct.safetensors", direct, pieces)
    write(tmp_path / "buffered.safetensors", buffered, pieces)
    assert not direct.direct_fds
    assert direct.opened == 1
    assert direct.direct_bytes > 0.99 * sum(SIZES)
    raw = (tmp_path / "direct.safetensors").read_bytes()
    assert raw == (tmp_path / "buffered.safetensors").read_bytes()
    found = load_file(tmp_path / "direct.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors().items())
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_of_it_is_left_in_the_page_cache(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", Recorded())
    spec = Shard(tmp_path / "x.safetensors", Files()).header.specs["t20000003"]
    cached = cached_pages(tmp_path / "x.safetensors")
    first = -(-spec.offset // mmap.PAGESIZE)
    last = (spec.offset + spec.nbytes) // mmap.PAGESIZE
    # The first and last MiB are left out: reading the header reads ahead, and edges are buffered.
    assert not any(cached[first + 256 : last - 256])


@pytest.mark.parametrize("fails_at", [0, 9_000_000, 20_000_000])
def test_a_failed_write_is_told_and_leaves_nothing(tmp_path: Path, fails_at: int) -> None:
    files = Recorded(fails_at)
    with pytest.raises(StorageError, match="made by the test"):
        write(tmp_path / "x.safetensors", files)
    assert list(tmp_path.iterdir()) == []
    assert not files.direct_fds
    assert not any(one.name.startswith("diskoffload-write") for one in threading.enumerate())


def test_what_is_suspended_is_on_disk_and_goes_on(tmp_path: Path) -> None:
    path, values = tmp_path / "x.safetensors", tensors()
    planned: Any = [(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    writer = ShardWriter(path, planned, Recorded())
    done = [name for name in values if name != "t5"]
    for name in done:
        writer.write(name, tensor_bytes(values[name]))
    digests = dict(writer.digests)
    writer.suspend()
    writer = ShardWriter.resumed(path, planned, Files(), finished=digests)
    writer.write("t5", tensor_bytes(values["t5"]))
    writer.publish()
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in values.items())


@pytest.mark.parametrize("fails_at", [0, 9_000_000])
def test_after_a_failed_write_nothing_is_called_durable(tmp_path: Path, fails_at: int) -> None:
    """Else a tensor that was complete by then would be noted as done, and is not in the file."""
    values = tensors()
    planned: Any = [(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    writer = ShardWriter(tmp_path / "x.safetensors", planned, Recorded(fails_at))

    def write_all() -> None:
        for name in values:
            writer.write(name, tensor_bytes(values[name]))
        writer.sync()

    with pytest.raises(StorageError, match="made by the test"):
        write_all()
    for _ in range(2):
        with pytest.raises(StorageError, match="failed before"):
            writer.sync()
    with suppress(StorageError):  # of other steps on their way
        writer.leave()
