"""How tensors are cut for reading, and where their values come to lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diskoffload.store.buffers import Buffers
from diskoffload.store.fills import Filling
from diskoffload.store.pieces import PIECE_BYTES, pieces_of
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.system.files import BLOCK_BYTES, Files
from diskoffload.system.memory import tensor_bytes


def stored_at(folder: Path, value: torch.Tensor, offset: int) -> ShardTensor:
    """Write a file whose one tensor begins at a byte, and open it."""
    described = {"a": {"dtype": "F32", "shape": list(value.shape)}}
    described["a"]["data_offsets"] = [0, value.nbytes]
    header = json.dumps(described).encode().ljust(offset - 8)
    raw = len(header).to_bytes(8, "little") + header + bytes(tensor_bytes(value))
    (folder / "x.safetensors").write_bytes(raw)
    found = stored_tensors(Shard(folder / "x.safetensors", Files()))["a"]
    assert isinstance(found, ShardTensor)
    assert found.spec.offset == offset
    return found


@pytest.mark.parametrize("nbytes", [4, BLOCK_BYTES, PIECE_BYTES, 2 * PIECE_BYTES + BLOCK_BYTES])
@pytest.mark.parametrize("offset", [128, 4096, 4096 + 200])
def test_a_tensor_is_cut_into_equal_parts_of_whole_blocks(
    tmp_path: Path, nbytes: int, offset: int
) -> None:
    stored = stored_at(tmp_path, torch.zeros(nbytes // 4), offset)
    ranges = pieces_of(stored).ranges
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, nbytes)
    assert all((offset + start) % BLOCK_BYTES == 0 for start, _ in ranges[1:])
    sizes = [stop - start for start, stop in ranges]
    assert len(sizes) == -(-nbytes // (PIECE_BYTES + PIECE_BYTES // 4))
    assert max(sizes) - min(sizes) <= 2 * len(sizes) * BLOCK_BYTES


@pytest.mark.parametrize("offset", [128, 128 + 8, 128 + 6])
def test_a_value_is_aligned_whatever_its_file_does(tmp_path: Path, offset: int) -> None:
    value = torch.arange(100_000, dtype=torch.float32)
    found = Filling().begin(stored_at(tmp_path, value, offset), Buffers()).value()
    assert torch.equal(found, value)
    assert found.data_ptr() % 64 == 0
