"""Every byte of a compressed shard is guarded: an error, or the very same tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diskoffload.errors import DamagedFileError
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.folder import Folder
from diskoffload.store.header import FILLER_PREFIX
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files
from diskoffload.verifying import verify

VALUES = {
    "packed": (torch.arange(700) % 50).to(torch.bfloat16).reshape(70, 10),
    "constant": torch.full((300,), 2.5),
    "as it is": torch.arange(4, dtype=torch.int16),
    "double": torch.arange(3).to(torch.complex128),
}


def written(tmp_path: Path) -> bytes:
    folder = Folder(tmp_path / "off")
    tickets = [folder.put(name, value, "zstd") for name, value in VALUES.items()]
    folder.flush()
    (shard,) = folder.shards()
    kinds = [type(ticket.stored) is EncodedTensor for ticket in tickets]
    assert kinds == [True, True, False, True]
    return shard.path.read_bytes()


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read the way a model does; what lies in the file as it is is compared at its first read."""
    shard = Shard(path, Files())
    shard.check_first_reads(True)
    found = {}
    for name, stored in stored_tensors(shard).items():
        if not name.startswith(FILLER_PREFIX):
            value = stored.mapped()
            found[name] = stored.load() if value is None else value.clone()
    return found


def alike(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == VALUES.keys() and all(
        found[name].dtype == value.dtype
        and found[name].shape == value.shape
        and torch.equal(found[name], value)
        for name, value in VALUES.items()
    )


@pytest.mark.parametrize(
    "bit", [0x01, *(pytest.param(bit, marks=pytest.mark.slow) for bit in (0x20, 0x80))]
)
def test_every_byte_of_a_packed_shard_is_guarded(tmp_path: Path, bit: int) -> None:
    raw = written(tmp_path)
    path = tmp_path / "s.safetensors"
    believed, refused = [], 0
    for number in range(len(raw)):
        path.write_bytes(raw[:number] + bytes([raw[number] ^ bit]) + raw[number + 1 :])
        try:
            found = read(path)
        except DamagedFileError:
            refused += 1
            continue
        if not alike(found):
            believed.append(number)
        path.unlink()
    assert believed == []
    assert refused > len(raw) * 0.6  # others are of digests, or of what only fills


def test_verify_finds_every_flipped_byte_of_the_packed_ones(tmp_path: Path) -> None:
    raw = written(tmp_path)
    path = tmp_path / "s.safetensors"
    path.write_bytes(raw)
    assert (verify(path).checked, verify(path).faults) == (4, [])
    specs = Shard(path, Files()).header.specs.values()
    for spec in specs:
        if spec.name.startswith(FILLER_PREFIX):
            continue
        for number in range(spec.offset, spec.offset + spec.nbytes, 7):
            path.write_bytes(raw[:number] + bytes([raw[number] ^ 4]) + raw[number + 1 :])
            (fault,) = verify(path).faults
            assert (fault.tensor, fault.offset) == (spec.name, spec.offset)


@pytest.mark.parametrize("rows", [(0, 70), (0, 1), (69, 70)])
def test_rows_of_a_damaged_chunk_are_refused(tmp_path: Path, rows: tuple[int, int]) -> None:
    raw = bytearray(written(tmp_path))
    path = tmp_path / "s.safetensors"
    path.write_bytes(raw)
    spec = Shard(path, Files()).header.specs["packed"]
    raw[spec.offset + spec.nbytes // 2] ^= 16
    path.write_bytes(raw)
    stored = stored_tensors(Shard(path, Files()))["packed"]
    with pytest.raises(DamagedFileError, match=r"tensor 'packed', chunk 0: a compressed chunk is"):
        stored.load_rows(*rows)
