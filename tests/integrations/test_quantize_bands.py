"""Quantizing a weight in many bands, read past the page cache: the same bytes, in less memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from models import digests, save_model

import diskoffload
from diskoffload.errors import BudgetError, DamagedFileError
from diskoffload.integrations.quantization import SCHEMES
from diskoffload.quantize import bands as quantize_bands
from diskoffload.quantize import plan_quantization, quantize_checkpoint
from diskoffload.store import bands
from diskoffload.store.shard import Shard
from diskoffload.system.files import Files

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source") / "llama", torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "dtype"), list(itertools.product(SCHEMES, (None, "float16"))), ids=str
)
def test_the_bytes_do_not_depend_on_the_bands(
    source: Path, tmp_path: Path, scheme: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(source, tmp_path / "whole", scheme, dtype=dtype)
    read = {"parts": 0}
    read_past_cache = Shard.read_past_cache

    def counted(self: Shard, *arguments: object) -> None:
        read["parts"] += 1
        read_past_cache(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "read_past_cache", counted)
    monkeypatch.setattr(Shard, "is_cached", lambda self, spec: False)
    monkeypatch.setattr(bands, "_LEAST_BYTES", 1)
    monkeypatch.setattr(quantize_bands, "_BAND_BYTES", 10_000)
    monkeypatch.setattr(quantize_bands, "_MOST_BYTES", 300_000)
    plan = quantize_checkpoint(source, tmp_path / "out", scheme, dtype=dtype).plan
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert read["parts"] > 2 * (len(plan.quantized) + len(plan.copied))


def test_less_memory_is_taken_where_less_is_allowed(source: Path, tmp_path: Path) -> None:
    most = plan_quantization(source, tmp_path / "x", "W4A16").memory_bytes
    less = plan_quantization(source, tmp_path / "x", "W4A16", max_memory=most - (1 << 20))
    assert less.memory_bytes == most - (1 << 20)
    with pytest.raises(BudgetError, match="at least"):
        plan_quantization(source, tmp_path / "x", "W4A16", max_memory="8MiB")


def test_a_copied_tensor_is_compared_with_its_checksum(source: Path, tmp_path: Path) -> None:
    model = diskoffload.open_checkpoint(source)
    diskoffload.save_checkpoint(model, tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    spec = Shard(file, Files()).header.specs["model.embed_tokens.weight"]
    raw = bytearray(file.read_bytes())
    raw[spec.offset + 1000] ^= 4
    file.write_bytes(raw)
    with pytest.raises(
        DamagedFileError, match=r"embed_tokens\.weight.*not those that were written"
    ):
        quantize_checkpoint(tmp_path / "saved", tmp_path / "out", "W4A16")
    assert not (tmp_path / "out").exists()


def test_what_a_large_weight_takes_grows_with_its_scales_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    needed = plan_quantization(source, tmp_path / "x", "W4A16").memory_bytes
    monkeypatch.setattr(quantize_bands, "_BAND_BYTES", 128)
    in_rows = plan_quantization(source, tmp_path / "x", "W4A16").memory_bytes
    assert in_rows == needed  # of bfloat16 as it is stored nothing but scales stays
