"""A checkpoint packed: it opens where it lies, and comes back byte for byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from models import digests, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diskoffload
from diskoffload import cli
from diskoffload.checkpoint import publish
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import (
    CheckpointError,
    DamagedFileError,
    InvalidInputError,
    NoSpaceError,
    OutputExistsError,
    UnsupportedTensorError,
)
from diskoffload.inspect import inspect_path
from diskoffload.packing import pack, plan_packing
from diskoffload.quantize import quantize_checkpoint
from diskoffload.resumable.interrupted import Interrupted
from diskoffload.store import payoff
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files

TOKENS = torch.tensor([[1, 7, 200, 47]])


def odd_tensors() -> dict[str, torch.Tensor]:
    """Give all that is hard to keep: every dtype, NaNs with payloads, empties, odd lengths."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 15), 1 << 15, (70_001,), generator=generator, dtype=torch.int16)
    weights = torch.randn(300_001, generator=generator) * 0.02
    found = {
        "any bits": bits.view(torch.bfloat16),
        "any halves": bits.clone().view(torch.float16),
        "nan": torch.tensor([0x7FC0_0001, -1, 0x7F80_0001], dtype=torch.int32).view(torch.float32),
        "minus zero": torch.full((40_000,), -0.0),
        "one": torch.tensor(3.25),
        "none": torch.zeros(0, 5),
        "long": torch.arange(100_000),
        "bools": weights[:1001] > 0,
        "double": weights.double(),
        "e4m3": (weights * 100).to(torch.float8_e4m3fn),
        "int8": (weights * 1000).clamp(-127, 127).to(torch.int8),
        "int4": torch.randint(0, 256, (99_999,), generator=generator, dtype=torch.uint8),
        "complex": torch.complex(weights[:5000], weights[5000:10000]),
        "constant": torch.full((1 << 20,), 7, dtype=torch.int16),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found[f"weights {dtype}"] = weights.to(dtype).view(-1, 1)
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of odd tensors, its header spelled as ours never is."""
    path = tmp_path_factory.mktemp("odd") / "model.safetensors"
    save_file(odd_tensors(), path, {"format": "pt", "größe": "ß \U0001f600"})
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    spelled = json.dumps(json.loads(raw[8 : 8 + length]), indent=3).encode() + b" " * 5
    path.write_bytes(struct.pack("<Q", len(spelled)) + spelled + raw[8 + length :])
    return path


def test_every_family_comes_back_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    done = diskoffload.pack_checkpoint(checkpoint, tmp_path / "packed")
    assert done.packed > 10
    assert done.written_bytes < 0.85 * done.plan.read_bytes
    assert not diskoffload.verify(tmp_path / "packed").faults
    diskoffload.unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(checkpoint)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["back", "packed"]


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_it_opens_where_it_lies(checkpoint: Path, tmp_path: Path, mode: Any) -> None:
    diskoffload.pack_checkpoint(checkpoint, tmp_path / "packed")
    before = digests(tmp_path / "packed")
    model: Any = diskoffload.open_checkpoint(
        tmp_path / "packed", offload_dir=tmp_path / "offload", mode=mode
    )
    plain = load(checkpoint)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
        name, weight = next((n, p) for n, p in plain.named_parameters() if p.dim() == 2)
        cache = model.get_submodule(name.rpartition(".")[0])._parameters
        assert torch.equal(cache.read_rows("weight", 3, 17), weight[3:17])
        for both in (model, plain):
            both.get_parameter(name).mul_(2)
    diskoffload.save_checkpoint(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(TOKENS).logits, plain(TOKENS).logits)
    tensors = Checkpoint(tmp_path / "saved").tensors.values()
    assert not any(isinstance(one, EncodedTensor) for one in tensors)
    assert digests(tmp_path / "packed") == before


def test_commits_go_on_over_a_packed_source(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    diskoffload.pack_checkpoint(checkpoints["llama"], tmp_path / "packed")
    model: Any = diskoffload.open_checkpoint(tmp_path / "packed", offload_dir=tmp_path / "o")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        expected = model(TOKENS).logits
    diskoffload.commit(model)
    del model
    again: Any = diskoffload.reopen(tmp_path / "o", compression=lambda name, tensor: True)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, expected)


def test_hard_values_come_back_and_can_be_listed(odd: Path, tmp_path: Path) -> None:
    done = diskoffload.pack_checkpoint(odd, tmp_path / "packed")
    packed = tmp_path / "packed" / "model.safetensors"
    with safe_open(packed, "pt") as listed:  # as any tool sees it
        assert set(odd_tensors()) <= set(listed.keys())
        assert listed.metadata()["größe"] == "ß \U0001f600"
        assert listed.get_tensor("int4").equal(odd_tensors()["int4"])  # stored as it is
    assert done.packed == sum(one.compression is not None for one in inspect_path(packed).tensors)
    raw = {one.name for one in inspect_path(packed).tensors if one.compression is None}
    assert {"int4", "none"} <= raw
    for name, tensor in Checkpoint(packed).tensors.items():
        if name in odd_tensors():
            found, value = tensor.load(), odd_tensors()[name]
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert found.view(-1).view(torch.uint8).equal(value.view(-1).view(torch.uint8)), name
            mapped = tensor.mapped()
            assert mapped is None or mapped.data_ptr() % 64 == 0
    diskoffload.unpack_checkpoint(packed, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == odd.read_bytes()
    assert [one.name for one in (tmp_path / "back").iterdir()] == ["model.safetensors"]


def test_every_flipped_byte_is_told_or_harmless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {"w": (torch.randn(40, 20) * 0.02).bfloat16(), "r": torch.arange(3)}
    save_file(values, tmp_path / "model.safetensors")
    diskoffload.pack_checkpoint(tmp_path / "model.safetensors", tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    whole = path.read_bytes()
    told = 0
    for at in range(len(whole)):
        # Another file each time: nothing is to be remembered of the one before.
        flipped = tmp_path / "flipped.safetensors"
        flipped.unlink(missing_ok=True)
        flipped.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = {name: one.load() for name, one in Checkpoint(flipped).tensors.items()}
        except DamagedFileError:
            told += 1
            continue
        assert found.keys() >= values.keys(), at
        assert all(torch.equal(found[name], value) for name, value in values.items()), at
    # What is not told of: spaces behind the header, and what only fills a gap.
    assert told > len(whole) - 400


def test_a_part_is_chosen_by_name_or_by_a_function(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = str(checkpoints["llama"])
    cli.main(
        ["pack", source, str(tmp_path / "a"), "--only", "re:.*mlp", "--skip", "down_proj.weight"]
    )
    packed = {
        name
        for name, one in Checkpoint(tmp_path / "a").tensors.items()
        if isinstance(one, EncodedTensor)
    }
    assert packed == {
        f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("gate", "up")
    }
    asked: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def choose(name: str, tensor: Any) -> Any:
        asked.append((name, tensor.dtype, tuple(tensor.shape)))
        return "zstd" if tensor.shape[0] == 256 else None

    done = diskoffload.pack_checkpoint(source, tmp_path / "b", compression=choose)
    assert ("lm_head.weight", torch.bfloat16, (256, 128)) in asked
    assert 0 < len(done.plan.packed) < len(asked)
    for wrong in (lambda name, tensor: 3, lambda name, tensor: "lz4", "lz4", None, 7):
        with pytest.raises(InvalidInputError):
            diskoffload.pack_checkpoint(source, tmp_path / "c", compression=wrong)  # type: ignore[arg-type]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b"]


def test_what_cannot_be_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, packed = checkpoints["llama"], tmp_path / "packed"
    diskoffload.pack_checkpoint(source, packed)
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="packed already"):
        diskoffload.pack_checkpoint(packed, tmp_path / "again")
    with pytest.raises(CheckpointError, match="not written by `diskoffload pack`"):
        diskoffload.unpack_checkpoint(source, tmp_path / "again")
    with pytest.raises(InvalidInputError, match="in its source"):
        diskoffload.unpack_checkpoint(packed, packed / "inside")
    with pytest.raises(OutputExistsError):
        diskoffload.pack_checkpoint(source, packed)
    with pytest.raises(CheckpointError, match="does not exist"):
        diskoffload.pack_checkpoint(tmp_path / "nothing", tmp_path / "again")
    pytest.importorskip("compressed_tensors")
    with pytest.raises(UnsupportedTensorError, match="`diskoffload unpack`"):
        quantize_checkpoint(packed, tmp_path / "again", "W8A16")
    assert digests(tmp_path) == before


def stopped_after(count: int) -> Any:
    answers = [False] * count + [True]
    return lambda: answers.pop(0)


def test_another_job_in_the_same_place_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source, out = checkpoints["llama"], tmp_path / "out"
    with pytest.raises(Interrupted, match="stopped after 9 of"):
        diskoffload.pack_checkpoint(source, out, stop=stopped_after(9))
    before = digests(tmp_path)
    with pytest.raises(OutputExistsError, match="the list of what is left as it is was "):
        diskoffload.pack_checkpoint(source, out, compression=lambda name, _: "mlp" in name)
    with pytest.raises(OutputExistsError, match="source's model-00003"):
        diskoffload.pack_checkpoint(checkpoints["qwen3-tied"], out)
    pytest.importorskip("compressed_tensors")
    with pytest.raises(OutputExistsError, match="the command was pack and is quantize"):
        quantize_checkpoint(source, out, "W8A16")
    assert digests(tmp_path) == before
    assert diskoffload.pack_checkpoint(source, out).resumed == 9
    diskoffload.unpack_checkpoint(out, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)


class Forgetful(Files):
    """A disk that gives back one other byte of a file than was written."""

    def __init__(self) -> None:
        super().__init__(may_read_past_cache=False)

    def rename(self, source: Path, target: Path) -> None:
        if target.suffix == ".safetensors":
            with source.open("r+b") as file:
                file.seek(-30, 2)
                byte = file.read(1)[0]
                file.seek(-30, 2)
                file.write(bytes([byte ^ 16]))
        super().rename(source, target)


def test_what_is_not_read_back_as_it_was_never_appears(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source, out = checkpoints["llama"], tmp_path / "out"
    job = pack._prepare(source, out, "zstd")[1]
    job.files = Forgetful()
    with pytest.raises(DamagedFileError, match="was just written, and what is read back"):
        pack.carry_out(job, show_progress=False, stop=lambda: False)
    assert not out.exists()
    diskoffload.pack_checkpoint(source, out)
    diskoffload.unpack_checkpoint(out, tmp_path / "back")
    assert digests(tmp_path / "back") == digests(source)


def test_a_full_disk_is_told_of_before_anything_is_written(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(NoSpaceError, match="too little"):
        diskoffload.pack_checkpoint(checkpoints["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def measured(reads: float) -> payoff.Payoff:
    return payoff.Payoff(reads, reads, 1e9, 5e8, 0.67, 2, True)


def test_auto_packs_only_where_it_pays(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = str(checkpoints["llama"])
    monkeypatch.setattr(pack, "measure_payoff", lambda folder, files: measured(3e9))
    assert cli.main(["pack", source, str(tmp_path / "out"), "--if-it-pays"]) == 0
    assert "does not pay: the disk reads 2.79 GiB/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(pack, "measure_payoff", lambda folder, files: measured(1e8))
    done = diskoffload.pack_checkpoint(source, tmp_path / "out", compression="auto")
    assert done.packed > 10
    assert done.plan.reason is not None


def test_the_commands_say_what_they_do(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed, back = str(checkpoints["llama"]), str(tmp_path / "p"), str(tmp_path / "b")
    assert cli.main(["pack", source, packed, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == plan_packing(source, packed).as_json()
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["pack", source, packed, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert abs(done["written_bytes"] - plan["written_bytes"]) < 0.05 * done["read_bytes"]
    assert cli.main(["unpack", packed, back, "--dry-run"]) == 0
    assert "written" in capsys.readouterr().out
    assert cli.main(["unpack", packed, back]) == 0
    assert "read back and compared" in capsys.readouterr().out
    assert digests(Path(back)) == digests(Path(source))
    assert cli.main(["pack", packed, str(tmp_path / "again")]) == 1
    assert "packed already" in capsys.readouterr().err


def test_the_result_is_the_same_each_time(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        diskoffload.pack_checkpoint(checkpoints["mixtral"], tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    first = next((tmp_path / "a").glob("*.safetensors"))
    assert load_file(first).keys() >= stored_tensors(Checkpoint(first).shards[first.name]).keys()
