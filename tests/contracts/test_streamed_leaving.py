"""How a streamed weight leaves memory: looked at for edits by another thread, never unseen."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.residency import held as held_module
from diskoffload.store.fills import Check

LAYERS, WIDTH = 24, 512  # 1 MiB each
BUDGET_BYTES = 12 << 20


def opened(folder: Path) -> tuple[torch.nn.Sequential, Any]:
    """Make a checkpoint of twice the budget; give its model in memory, and streamed."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    (folder / "c").mkdir()
    save_file(plain.state_dict(), folder / "c" / "model.safetensors")
    with torch.device("meta"):
        bare = torch.nn.Sequential(
            *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        )
    model = diskoffload.open_checkpoint(
        folder / "c", model=bare, offload_dir=folder / "o", max_memory=BUDGET_BYTES, mode="streamed"
    )
    return plain, model


def sums(model: Any) -> list[float]:
    return [float(layer.weight.detach().double().sum()) for layer in model]


def made_later(residency: Any, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Have no thread look for edits; give the looks that are asked for, for the test to run."""
    made: list[Check] = []

    def later(data: memoryview, when_known: Any) -> Check:
        made.append(Check(data, when_known))
        return made[-1]

    monkeypatch.setattr(residency._streaming, "check", later)
    return made


def test_who_computes_digests_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = opened(tmp_path)
    digested: list[int] = []
    digest_of = held_module.digest_of

    def counted(tensor: torch.Tensor) -> bytes:
        digested.append(threading.get_ident())
        return digest_of(tensor)

    monkeypatch.setattr(held_module, "digest_of", counted)
    for _ in range(4):
        assert sums(model) == sums(plain)
    residency = model[0]._parameters.residency
    assert residency.loaded_count > 3 * LAYERS // 2
    assert residency.loaded_bytes <= BUDGET_BYTES
    # Where the readers are late it is made at once; each that left would be one without them.
    assert digested.count(threading.get_ident()) <= residency.loaded_count // 3


def test_edits_of_a_model_larger_than_the_budget_are_seen_at_every_pass(tmp_path: Path) -> None:
    plain, model = opened(tmp_path)
    for _ in range(3):
        for layer, other in zip(model, plain, strict=True):
            layer.weight.data.mul_(2)
            other.weight.data.mul_(2)  # type: ignore[operator, union-attr]
        assert sums(model) == sums(plain)


def test_what_is_read_again_while_it_is_looked_at_may_be_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = opened(tmp_path)
    residency = model[0]._parameters.residency
    made = made_later(residency, monkeypatch)
    model[3].weight  # noqa: B018 - reads it
    held = dict(model[3]._parameters.held_items())["weight"]
    assert residency.begin_release(held) == WIDTH * WIDTH * 4
    made[0].run()  # it was as it had been filled
    model[3].weight.data.add_(1)
    assert residency.release(held)
    assert held.state is not held_module.State.VACANT
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]
    model[3]._parameters.sync()
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]


def test_what_somebody_knows_weakly_is_not_looked_at_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has a weak reference gets the object without asking, and could edit it after the look."""
    plain, model = opened(tmp_path)
    residency = model[0]._parameters.residency
    made = made_later(residency, monkeypatch)
    ref = weakref.ref(model[3].weight)
    held = dict(model[3]._parameters.held_items())["weight"]
    weight = ref()
    assert weight is not None
    weight.data.add_(1)
    del weight
    residency.begin_release(held)
    assert not made
    assert held.check is None
    assert torch.equal(model[3].weight, plain[3].weight + 1)  # type: ignore[operator]


def test_what_leaves_is_spread_evenly_over_a_pass(tmp_path: Path) -> None:
    _, model = opened(tmp_path)
    for _ in range(4):
        sums(model)
    held = [dict(layer._parameters.held_items())["weight"] for layer in model]
    kept = [one.state is held_module.State.LOADED for one in held]
    runs = "".join("x" if one else " " for one in kept[2:-4]).split("x")
    assert max(map(len, runs)) <= 4, kept
