"""Commits where nobody says which pages were edited: bytes are compared, and not over and over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.store.shard import Shard

COUNT, SIZE = 12, 64


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name each tensor that is compared with its file."""
    for asker in ("cache.disk_backing", "residency.edits"):
        monkeypatch.setattr(f"diskoffload.{asker}.written_pages", lambda *_: None)
    names: list[str] = []

    real = Shard.has_bytes

    def has_bytes(shard: Shard, spec: Any, value: memoryview, start: int = 0) -> bool:
        names.append(spec.name)
        return real(shard, spec, value, start)

    monkeypatch.setattr(Shard, "has_bytes", has_bytes)
    return names


def opened(tmp_path: Path) -> Any:
    weights = {f"{n}.weight": torch.full((SIZE, SIZE), float(n)) for n in range(COUNT)}
    save_file(weights, tmp_path / "m.safetensors")
    return diskoffload.open_checkpoint(
        tmp_path / "m.safetensors", model=bare(), offload_dir=tmp_path / "off"
    )


def bare() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(COUNT)))


def test_a_commit_compares_what_was_read_since_the_last(
    tmp_path: Path, compared: list[str]
) -> None:
    net = opened(tmp_path)
    for number, layer in enumerate(net):
        assert (layer.weight == number).all()
        diskoffload.commit(net)
    assert compared == [f"{number}.weight" for number in range(COUNT)]


@torch.no_grad()
def test_what_is_in_use_is_compared_each_time(tmp_path: Path, compared: list[str]) -> None:
    net = opened(tmp_path)
    kept = net[3].weight.data
    for value in (30.0, 30.0, 31.0):
        kept.fill_(value)  # also where it was compared and found as it is
        diskoffload.commit(net)
        assert "3.weight" in compared
        again = diskoffload.reopen(tmp_path / "off", model=bare(), read_only=True)
        assert (again[3].weight == value).all()
        assert (again[4].weight == 4).all()
        del again
    del kept
    net[4].weight.add_(1)
    net[5].weight.data[-1, -1] = 7
    diskoffload.commit(net)
    again = diskoffload.reopen(tmp_path / "off", model=bare(), read_only=True)
    assert (again[4].weight == 5).all()
    assert again[5].weight.flatten()[-2:].tolist() == [5, 7]


@torch.no_grad()
@pytest.mark.parametrize("ours", [False, True], ids=["the source", "a file of ours"])
@pytest.mark.parametrize("is_edited", [False, True], ids=["as it was", "edited"])
def test_what_only_the_mapping_has_is_written_anew(
    tmp_path: Path, compared: list[str], ours: bool, is_edited: bool
) -> None:
    net = opened(tmp_path)
    if ours:
        net[2].weight = torch.nn.Parameter(torch.full((SIZE, SIZE), 2.5))
        net[2]._parameters.sync()
    before = net[2].weight[0, 0].item()
    value = net[2].weight.data
    net[2]._parameters._entry(net[2].weight).backing.stored.shard.rest()  # no descriptor is left
    files = [*(tmp_path / "off").glob("*.safetensors")] if ours else [tmp_path / "m.safetensors"]
    for path in files:
        path.unlink()
    if is_edited:
        value.add_(1)
    del value
    net[2]._parameters.sync()
    assert (net[2].weight == before + is_edited).all()
    held = net[2]._parameters._entry(net[2].weight)
    # Without a checksum nobody can tell; what has one is written only if it was edited.
    assert held.backing.stored.shards[0].is_gone() is (ours and not is_edited)
    assert compared == []
