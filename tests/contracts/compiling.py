"""A fresh compiler for each test, and what is done to a module under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import functional_export
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from tqdm import tqdm
from ways import WAYS, Net, written

import diskoffload
from diskoffload.residency.resident import Residency


def slow(parameter: Any) -> Any:
    return pytest.param(parameter, marks=pytest.mark.slow)


def quick_on(*quick: str, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run on all ways but some, on few of them unless slow tests are wanted."""
    ways = [way if way in quick else slow(way) for way in WAYS if way not in but]
    return pytest.mark.parametrize("way", ways)


@pytest.fixture(autouse=True, scope="module")
def compiler_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # a thread that stays
    torch._dynamo.reset()
    counters.clear()
    # Neither processes nor files that stay.
    with inductor_config.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False}):
        yield
    torch._dynamo.reset()
    for name in [name for name in vars(functional_export) if name.startswith("__compiled_fn")]:
        delattr(functional_export, name)  # torch keeps every module that was exported strictly


def compiled(function: Any, backend: str = "eager", **options: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def graphs() -> int:
    """How many graphs were made so far; nothing was cut short on the way."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def residency_of(net: Net) -> Residency:
    return net.up._parameters.residency


def with_tiny_budget(net: Net) -> None:
    if isinstance(net._parameters, diskoffload.OffloadCache):
        residency_of(net).max_bytes = 1


def everything_leaves(net: Net) -> None:
    """Do all that takes memory away from what nobody uses; no cycle keeps it, so no ``gc``."""
    net.state_dict()  # each that is loaded has the one before it leave
    with diskoffload.disable_offloading():
        net.state_dict()
    for _ in range(2):  # what is stored is laid beneath an object at the next look
        written(net)
    if isinstance(net._parameters, diskoffload.OffloadCache):
        residency_of(net).make_room(0)
