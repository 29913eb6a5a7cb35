"""How weights on disk are held is chosen by a named mode, however they came there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diskoffload


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))


def streams(model: Any) -> bool:
    return bool(model[0]._parameters.residency.streams)


def states(model: Any) -> set[str]:
    return {held.state.name for _, held in model[0]._parameters.held_items()}


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
@pytest.mark.parametrize("way", ["offload_model", "dispatch_model", "dispatch_with_map"])
def test_a_model_from_memory_takes_a_mode(way: str, mode: Any, tmp_path: Path) -> None:
    plain, model = net(), net()
    x = torch.randn(4, 512)
    if way == "offload_model":
        diskoffload.offload_model(model, "cpu", "disk", offload_dir=tmp_path / "o", mode=mode)
    elif way == "dispatch_model":
        diskoffload.dispatch_model(model, max_memory={"cpu": 0}, offload_dir=tmp_path, mode=mode)
    else:
        places = {str(n): ("cpu", "disk") for n in range(3)}
        diskoffload.dispatch_with_map(model, places, tmp_path, show_progress=False, mode=mode)
    for layer in model:
        layer._parameters.sync()  # type: ignore[operator]
    assert torch.equal(model(x), plain(x))
    model[0].weight  # noqa: B018 - its write has ended by now
    assert torch.equal(model(x), plain(x))
    assert streams(model) == (mode == "streamed")
    assert ("LOADED" in states(model)) == (mode == "streamed")


def test_dispatching_anew_leaves_the_mode_unless_another_is_named(tmp_path: Path) -> None:
    model = net()
    diskoffload.offload_model(model, "cpu", "disk", offload_dir=tmp_path, mode="streamed")
    diskoffload.offload_model(model, "cpu", "disk")
    assert streams(model)
    diskoffload.offload_model(model, "cpu", "disk", mode="mapped")
    assert not streams(model)


def test_what_is_in_use_goes_into_the_new_books(tmp_path: Path) -> None:
    model = net()
    diskoffload.offload_model(model, "cpu", "disk", offload_dir=tmp_path, mode="streamed")
    for layer in model:
        layer._parameters.sync()  # type: ignore[operator]
    used = model[0].weight
    model[1].weight.sum()
    before = model[0]._parameters.residency
    diskoffload.offload_model(model, "cpu", "disk", mode="mapped")
    after: Any = model[0]._parameters.residency
    assert before.loaded_bytes == 0  # type: ignore[union-attr]
    assert after.loaded_bytes == used.nbytes
    del used
    after.make_room(1)
    assert after.loaded_bytes == 0


def test_an_unknown_mode_changes_nothing(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(diskoffload.InvalidInputError, match="mapped, streamed"):
        diskoffload.offload_model(
            model,
            "cpu",
            "disk",
            offload_dir=tmp_path,
            mode="swapped",  # type: ignore[arg-type]
        )
    assert type(model[0]._parameters) is dict


def test_a_module_joins_another_in_its_temporary_folder() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    diskoffload.offload_module(first, "cpu", "disk")
    diskoffload.offload_module(second, **diskoffload.get_cache_init_kwargs(first))
    caches: Any = (first._parameters, second._parameters)
    assert caches[0].folder is caches[1].folder
