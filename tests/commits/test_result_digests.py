"""The results that we write carry checksums of their own: saved ones and quantized ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diskoffload
from diskoffload.errors import DamagedFileError
from diskoffload.store.digests import DIGESTS_KEY
from diskoffload.store.shard import Shard
from diskoffload.system.files import Files
from diskoffload.verifying import verify


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 40)
        self.second = torch.nn.Linear(40, 24, dtype=torch.bfloat16)
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("scale", torch.tensor(2, dtype=torch.int64))


def saved(path: Path) -> Path:
    torch.manual_seed(1)
    return diskoffload.save_checkpoint(Net(), path, max_shard_size=3000)


def opened(path: Path) -> torch.nn.Module:
    with torch.device("meta"):
        bare = Net()
    return diskoffload.open_checkpoint(path, model=bare)


def test_every_tensor_of_a_result_has_a_checksum(tmp_path: Path) -> None:
    found = verify(saved(tmp_path / "out"))
    assert (found.checked, found.unchecked, found.faults) == (6, 0, [])
    assert found.files > 1


def test_so_has_one_that_was_copied_inside_the_kernel(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(Net().state_dict(), tmp_path / "foreign.safetensors")
    assert verify(tmp_path / "foreign.safetensors").unchecked == 6
    model = opened(tmp_path / "foreign.safetensors")
    found = verify(diskoffload.save_checkpoint(model, tmp_path / "copy"))
    assert (found.checked, found.unchecked, found.faults) == (6, 0, [])
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    for name, value in Net().state_dict().items():
        assert copied[name].shape == value.shape


@pytest.mark.parametrize("name", ["second.weight", "scale"])
def test_what_is_damaged_is_not_copied_into_a_result(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path / "out")
    for path in source.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118
                continue
        raw = bytearray(path.read_bytes())
        header_bytes = int.from_bytes(raw[:8], "little") + 8
        shard = Shard(path, Files())
        offset = shard.header.specs[name].offset
        assert offset >= header_bytes
        raw[offset] ^= 1
        path.write_bytes(raw)
        break
    model = opened(source)
    with pytest.raises(DamagedFileError, match=rf"{path.name}, tensor '{name}' at offset {offset}"):
        diskoffload.save_checkpoint(model, tmp_path / "copy")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_every_byte_of_a_result_is_guarded(tmp_path: Path) -> None:
    path = sorted(saved(tmp_path / "out").glob("*.safetensors"))[-1]
    raw = path.read_bytes()
    missed = []
    for number in range(len(raw)):
        path.write_bytes(raw[:number] + bytes([raw[number] ^ 1]) + raw[number + 1 :])
        found = verify(path)
        if not found.faults or str(path) not in found.faults[0].file:
            missed.append(number)
    assert missed == []


def test_a_tool_that_keeps_the_metadata_of_another_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = saved(tmp_path / "out") / "model-00001-of-00003.safetensors"
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    assert DIGESTS_KEY in metadata
    edited = {name: value + 1 for name, value in tensors.items()}
    rewritten = tmp_path / "rewritten.safetensors"
    save_file({**edited, "one.more": torch.ones(3)}, rewritten, metadata=metadata)
    model = torch.nn.Module()
    for name, value in {**edited, "one.more": torch.ones(3)}.items():
        *parts, key = name.split(".")
        inner = model
        for part in parts:
            if not hasattr(inner, part):
                inner.add_module(part, torch.nn.Module())
            inner = getattr(inner, part)
        inner.register_buffer(key, torch.empty_like(value, device="meta"))
    with caplog.at_level(logging.WARNING):
        diskoffload.open_checkpoint(rewritten, model=model)
    assert "its header is not the one that its checksums were written with" in caplog.text
    for name, value in model.state_dict().items():
        assert torch.equal(value, {**edited, "one.more": torch.ones(3)}[name])
    (fault,) = verify(rewritten).faults
    assert "another tool wrote it anew and kept the metadata" in fault.reason
