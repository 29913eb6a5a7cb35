"""Where the system has no thread left, whoever asks for a tensor reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from thread_limit import threads_left

from diskoffload.store.buffers import Buffers
from diskoffload.store.fills import Filling
from diskoffload.store.pieces import PIECE_BYTES
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files


@pytest.mark.parametrize("count", [0, 1])
def test_a_value_is_read_whole(tmp_path: Path, count: int) -> None:
    value = torch.arange(2 * PIECE_BYTES + 4096, dtype=torch.int64).to(torch.uint8)
    save_file({"a": value, "b": value + 1}, tmp_path / "x.safetensors")
    stored = stored_tensors(Shard(tmp_path / "x.safetensors", Files()))
    filling, buffers = Filling(), Buffers()
    with threads_left(count):
        for name, wanted in (("a", value), ("b", value + 1)):
            found = filling.begin(stored[name], buffers).value()
            assert torch.equal(found, wanted)
