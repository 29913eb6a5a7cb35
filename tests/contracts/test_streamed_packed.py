"""Compressed weights are streamed: read past the page cache, decoded into reused buffers, kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import diskoffload
from diskoffload.residency.resident import Residency
from diskoffload.store import pieces
from diskoffload.store.shard import Shard

LAYERS, WIDTH = 6, 1000
WEIGHT_BYTES = WIDTH * WIDTH * 4


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    made = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    for layer in made:
        layer.weight.data = layer.weight.data.bfloat16().float()  # type: ignore[union-attr, operator]
    return made


def packed(tmp_path: Path, max_bytes: int) -> Any:
    model: Any = net()
    residency = Residency(max_bytes, mode="streamed")
    for name, layer in model.named_children():
        diskoffload.offload_module(
            layer,
            "cpu",
            "disk",
            offload_dir=tmp_path / "offload",
            compression="zstd",
            name=name,
            residency=residency,
        )
    for _ in range(2):
        model[0]._parameters.sync()
    for layer in model:
        layer.weight.sum()
    residency.make_room(0)
    return model


def held_states(model: Any) -> list[str]:
    held = [layer._parameters.held_items() for layer in model]
    return [one.state.name for items in held for _, one in items if one is not None]


@pytest.mark.parametrize("piece_bytes", [1, 4 << 20])
def test_values_are_the_same_and_edits_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(pieces, "_PACKED_PIECE_BYTES", piece_bytes)
    plain, model = net(), packed(tmp_path, 3 * WEIGHT_BYTES)
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
        for both in (model, plain):
            both[2].weight.mul_(2)
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
    assert model[0]._parameters.residency.loaded_bytes <= 3 * WEIGHT_BYTES


def test_what_is_kept_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tmp_path, 3 * WEIGHT_BYTES)
    read: list[int] = []
    whole = Shard.read_past_cache

    def counted(self: Shard, spec: Any, start: int, stop: int, buffer: Any) -> None:
        read.append(stop - start)
        whole(self, spec, start, stop, buffer)

    monkeypatch.setattr(Shard, "read_past_cache", counted)
    sums = []
    for _ in range(4):
        read.clear()
        sums.append([float(layer.weight.detach().sum()) for layer in model])
        model[0]._parameters.residency.quiesce()
    assert sums[1:] == sums[:-1]
    packed_bytes = WEIGHT_BYTES * 0.36
    assert 0 < sum(read) <= (LAYERS - 1) * packed_bytes  # all but what was kept, and packed
    assert "LOADED" in held_states(model)


def test_a_wrong_byte_is_told(tmp_path: Path) -> None:
    model = packed(tmp_path, WEIGHT_BYTES)
    (file,) = (tmp_path / "offload").glob("*.safetensors")
    held = dict(model[4]._parameters.held_items())["weight"]
    chunk = held.backing.streamable.chunk(2)
    stat = file.stat()
    with file.open("r+b") as opened:
        opened.seek(chunk.offset + chunk.packed_bytes // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 4]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(diskoffload.DamagedFileError, match="chunk 2"):
        [float(layer.weight.detach().sum()) for layer in model]
