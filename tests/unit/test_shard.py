"""One file at rest: what is mapped, for how long, and what is noticed."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shard_files import (
    STORABLE,
    descriptors_of,
    entry,
    file_bytes,
    mappings_of,
    noise,
    open_shard,
    same,
)

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.shard import Shard
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes

pytestmark = pytest.mark.usefixtures("no_leaks")

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": noise(torch.bfloat16, (5,)),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "nothing": torch.empty(0, 3, dtype=torch.float16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


# ---------------------------------------------------------------------------- reading


def test_mapped_tensors_are_the_files_values(path: Path) -> None:
    shard = open_shard(path)
    for name, tensor in TENSORS.items():
        assert same(shard.mapped(shard.header.specs[name]), tensor), name


@pytest.mark.parametrize("dtype", STORABLE, ids=str)
def test_every_dtype_can_be_mapped(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": noise(dtype, (3, 5))}, tmp_path / "x.safetensors")
    shard = open_shard(tmp_path / "x.safetensors")
    assert same(shard.mapped(shard.header.specs["x"]), noise(dtype, (3, 5)))


def test_mapped_tensors_alias_one_mapping_each_with_a_storage_of_its_own(path: Path) -> None:
    shard = open_shard(path)
    matrix = shard.header.specs["matrix"]
    first, second = shard.mapped(matrix), shard.mapped(matrix)
    assert first.data_ptr() == second.data_ptr() == shard.memory.address + matrix.offset
    assert mappings_of(path) == 1
    for name, spec in shard.header.specs.items():
        tensor = shard.mapped(spec)
        assert tensor.untyped_storage().nbytes() == spec.nbytes, name
        assert tensor.storage_offset() == 0
        assert tensor.is_contiguous()
    first[0, 0] = 99
    assert second[0, 0] == 99
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_a_saved_mapped_tensor_is_saved_alone(path: Path, tmp_path: Path) -> None:
    shard = open_shard(path)
    torch.save(shard.mapped(shard.header.specs["scalar"]), tmp_path / "scalar.pt")
    assert (tmp_path / "scalar.pt").stat().st_size < 2000
    assert torch.load(tmp_path / "scalar.pt") == 7


def test_writing_to_a_mapped_tensor_changes_no_file_and_no_other_view(path: Path) -> None:
    before = path.read_bytes()
    ours, others = open_shard(path), open_shard(path)
    untouched = others.mapped(others.header.specs["matrix"])
    ours.mapped(ours.header.specs["matrix"]).mul_(2)
    assert torch.equal(ours.mapped(ours.header.specs["matrix"]), TENSORS["matrix"] * 2)
    assert torch.equal(untouched, TENSORS["matrix"])
    assert path.read_bytes() == before


def test_a_twin_has_a_mapping_of_its_own_and_keeps_the_file(path: Path) -> None:
    shard = open_shard(path)
    spec = shard.header.specs["matrix"]
    shard.mapped(spec).zero_()
    path.unlink()
    twin = shard.twin()
    assert torch.equal(twin.mapped(spec), TENSORS["matrix"])
    assert twin.owner is shard


def test_an_open_shard_maps_nothing_until_it_is_read(path: Path) -> None:
    shard = open_shard(path)
    assert mappings_of(path) == 0
    assert descriptors_of(path) == 1
    shard.mapped(shard.header.specs["nothing"])
    assert mappings_of(path) == 0


def test_the_mapping_lives_until_its_last_tensor_goes(path: Path) -> None:
    shard = open_shard(path)
    matrix, scalar = (shard.mapped(shard.header.specs[name]) for name in ("matrix", "scalar"))
    row = matrix.detach()[1].numpy()
    del shard
    assert descriptors_of(path) == 0
    assert mappings_of(path) == 1
    assert torch.equal(matrix, TENSORS["matrix"])
    del matrix
    assert row.tolist() == [4, 5, 6, 7]
    assert scalar == 7
    del row
    assert mappings_of(path) == 1
    del scalar
    assert mappings_of(path) == 0


def test_many_opened_shards_leave_nothing(path: Path) -> None:
    for _ in range(50):
        shard = open_shard(path)
        shard.mapped(shard.header.specs["matrix"]).add_(1)
    del shard
    assert (mappings_of(path), descriptors_of(path)) == (0, 0)


def test_a_refused_file_is_closed_though_the_error_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(file_bytes({"a": entry(dtype="?")}, b"1234"))
    with pytest.raises(DamagedFileError) as caught:
        open_shard(path)
    assert descriptors_of(path) == 0
    assert caught.tb is not None


def test_read_into_reads_parts(path: Path) -> None:
    shard = open_shard(path)
    target = bytearray(8)
    shard.read_into(shard.header.specs["matrix"], memoryview(target), 4)
    assert target == bytes(tensor_bytes(TENSORS["matrix"]))[4:12]


def test_hints_to_the_kernel_change_nothing(path: Path) -> None:
    shard = open_shard(path)
    spec = shard.header.specs["matrix"]
    tensor = shard.mapped(spec)
    shard.prefetch(spec)
    tensor[0, 0] = 5
    shard.drop_tensor_behind(spec)
    assert tensor.flatten().tolist() == [5, *range(1, 12)]


def test_threads_that_map_at_once_get_one_mapping(path: Path) -> None:
    shard = open_shard(path)
    barrier, found = threading.Barrier(8), []

    def read() -> None:
        barrier.wait()
        found.append(shard.mapped(shard.header.specs["matrix"]).data_ptr())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert mappings_of(path) == 1


# ------------------------------------------------------------------- changed while open


def test_a_truncated_file_is_noticed_before_it_is_touched(path: Path) -> None:
    shard = open_shard(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedFileError, match="was changed while it was open"):
        shard.check_unchanged()
    with pytest.raises(DamagedFileError, match=r"some\.safetensors"):
        shard.mapped(shard.header.specs["matrix"])
    with pytest.raises(StorageError):
        shard.read_into(shard.header.specs["matrix"], memoryview(bytearray(48)), 16)


def test_a_file_rewritten_in_place_is_noticed(path: Path, tmp_path: Path) -> None:
    shard = open_shard(path)
    shard.check_unchanged()
    path.write_bytes(path.read_bytes())  # same size, same bytes even: somebody writes to it
    os.utime(path, ns=(1, 1))
    with pytest.raises(DamagedFileError, match="open it again"):
        shard.check_unchanged()
    with pytest.raises(DamagedFileError):
        shard.memory  # noqa: B018
    items = [("matrix", torch.float32, (3, 4))]
    writer = ShardWriter(tmp_path / "out.safetensors", items, Files())
    with writer, pytest.raises(DamagedFileError):
        shard.copy_to(shard.header.specs["matrix"], writer, "matrix")


class ChangedWhileOpened(Files):
    """Lets somebody else truncate the file after its length was taken."""

    def size_bytes(self, fd: int, path: Path) -> int:
        nbytes = super().size_bytes(fd, path)
        os.truncate(path, nbytes - 40)
        return nbytes


def test_a_change_during_the_opening_is_noticed(path: Path) -> None:
    shard = Shard(path, ChangedWhileOpened())
    with pytest.raises(DamagedFileError, match="was changed"):
        shard.mapped(shard.header.specs["matrix"])


@pytest.mark.parametrize("how", ["renamed over", "removed", "folder renamed"])
def test_a_replaced_file_leaves_the_open_one_whole(path: Path, tmp_path: Path, how: str) -> None:
    shard = open_shard(path)
    if how == "renamed over":
        save_file({"matrix": torch.zeros(3, 4)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
    elif how == "removed":
        path.unlink()
    else:
        tmp_path.rename(tmp_path.with_name("elsewhere"))
    shard.check_unchanged()  # what it has open is what it opened
    assert torch.equal(shard.mapped(shard.header.specs["matrix"]), TENSORS["matrix"])
    if how == "folder renamed":
        tmp_path.with_name("elsewhere").rename(tmp_path)


def test_tensor_bytes_keep_the_memory_alive() -> None:
    view = tensor_bytes(torch.arange(1000, dtype=torch.int16).reshape(10, 100))
    gc.collect()
    assert len(view) == 2000
    assert view[2:4] == b"\1\0"
    assert len(tensor_bytes(torch.empty(0, 5))) == 0
    assert bytes(tensor_bytes(torch.tensor(1.0 + 2.0j, dtype=torch.complex128)))[6:8] == b"\xf0\x3f"
