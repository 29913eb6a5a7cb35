"""Where compiling ends: broken graphs, refusals, how often and how much, other threads."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import (
    compiled,
    compiler_files,
    everything_leaves,
    fresh_compiler,
    graphs,
    quick_on,
    residency_of,
    with_tiny_budget,
)
from torch._dynamo import config as dynamo_config
from ways import IDS, Net, hold, left_memory, make_net, written

import diskoffload
from diskoffload.cache.tracing import release_traced
from diskoffload.residency.resident import Residency

__all__ = ["compiler_files", "fresh_compiler"]  # fixtures


def broken(net: Net, replaced: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Do what breaks a graph, and much of what compiled code may do to a module."""
    found = []
    for _ in range(2):
        torch._dynamo.graph_break()
        found += [net(IDS), net.up.weight.sum(), next(net.parameters()).sum(), net.scale + 1]
        diskoffload.update_offload_parameter(net.up, "weight", net.up.weight + 1)
        net.scale = net.scale + 1
        net.up.bias = torch.nn.Parameter(net.up.bias + 1)
        with diskoffload.disable_offloading():
            found.append(net(IDS))
        found.append(torch.func.functional_call(net, replaced, (IDS,)))
    return found


@torch.no_grad()
@quick_on("zstd-written")
def test_where_a_graph_breaks_our_own_code_is_not_compiled(net: Net) -> None:
    plain = make_net()
    with_tiny_budget(net)
    left_memory(net)
    replaced = {name: torch.full_like(p, 0.1) for name, p in plain.named_parameters()}
    sources: set[str] = set()

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        sources.update(
            line for line in str(graph.print_readable(False)).splitlines() if "#" in line
        )
        return graph.forward

    run = torch.compile(broken, backend=backend)
    for _ in range(2):
        mine, theirs = run(net, replaced), broken(plain, replaced)
        assert all(map(torch.equal, mine, theirs))
    assert sources
    assert not [line for line in sources if "residency" in line or "store/" in line]
    left_memory(net)
    assert torch.equal(net(IDS), plain(IDS))


@torch.no_grad()
@quick_on("zstd-written")
def test_reading_and_updating_break_no_graph(net: Net) -> None:
    def update(net: Net) -> torch.Tensor:
        total = sum(parameter.sum() for _, parameter in net.named_parameters())
        diskoffload.update_offload_parameter(net.up, "weight", net.up.weight + 1)
        return net(IDS) + total + len(net.up._parameters)

    plain = make_net()
    run = compiled(update)
    for _ in range(3):
        assert torch.equal(run(net), update(plain))
    left_memory(net)
    assert torch.equal(net.up.weight, plain.up.weight)
    assert graphs() == 1


@quick_on("zstd-written", but=("plain",))
def test_assigning_in_one_graph_is_refused_with_a_reason(net: Net) -> None:
    def assign(net: Net) -> torch.Tensor:
        net.scale = net.scale + 1
        return net(IDS)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="moves tensors in and out of memory"):
        compiled(assign)(net)
    assert (net.scale == 2).all()


def test_what_cannot_be_read_raises_under_its_name(tmp_path: Path) -> None:
    net = hold(make_net(), "zstd-written", tmp_path)
    left_memory(net)
    for file in (tmp_path / "offload").rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(RuntimeError, match="DamagedFileError"):
        compiled(net)(IDS)
    with pytest.raises(diskoffload.DamagedFileError):
        net(IDS)


# ---------------------------------------------------------------------- how often, how much


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) * self.scale


def offloaded(model: torch.nn.Module, folder: Path, **options: Any) -> torch.nn.Module:
    residency = Residency()
    for name, module in model.named_modules():
        diskoffload.offload_module(
            module, "cpu", "disk", offload_dir=folder, name=name, residency=residency, **options
        )
    written(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_layers_compiled_one_by_one_are_compiled_once(
    tmp_path: Path, compression: str | None
) -> None:
    model = torch.nn.Sequential(*[Block() for _ in range(10)])
    x = torch.rand(2, 8)
    expected = model(x)
    for layer in offloaded(model, tmp_path / "offload", compression=compression):
        layer.compile(backend="eager", fullgraph=True)
    with dynamo_config.patch(recompile_limit=1):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert graphs() == 1


@torch.no_grad()
def test_classes_are_compiled_apart(tmp_path: Path) -> None:
    x = torch.rand(2, 8)
    with dynamo_config.patch(recompile_limit=1):
        for module in (torch.nn.Linear(8, 8), Block(), torch.nn.LayerNorm(8), torch.nn.PReLU()):
            expected = module(x)
            offloaded(module, tmp_path / "offload")
            assert torch.equal(compiled(module)(x), expected)
    assert graphs() == 4


@torch.no_grad()
@quick_on("disk", "zstd-written")
def test_what_compiled_code_keeps_can_be_released(net: Net, way: str, caplog: Any) -> None:
    plain = make_net()
    with_tiny_budget(net)
    run = compiled(net)
    with caplog.at_level(logging.WARNING, "diskoffload"):
        assert torch.equal(run(IDS), plain(IDS))
    loads = way in (
        "cpu-elsewhere",
        "zstd-written",
        "opened-cast",
        "disk-streamed",
        "zstd-streamed",
    )
    assert ("keeps all that it reads" in caplog.text) == loads
    if way == "plain":
        return
    left_memory(net)
    assert (residency_of(net).loaded_bytes > 0) == loads
    release_traced(net)
    assert residency_of(net).loaded_bytes == 0
    assert torch.equal(run(IDS), plain(IDS))
    assert torch.equal(net(IDS), plain(IDS))


@pytest.fixture
def quick_switching() -> Iterator[None]:
    """Have threads take turns in the middle of things."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@torch.no_grad()
@quick_on("zstd-written", but=("plain",))
def test_compiled_code_runs_while_other_threads_read_and_evict(
    net: Net, quick_switching: None
) -> None:
    expected = make_net()(IDS)
    with_tiny_budget(net)
    run = compiled(net)
    assert torch.equal(run(IDS), expected)
    other = copy.deepcopy(net)
    stop = threading.Event()
    wrong: list[object] = []

    def disturb() -> None:
        while not stop.is_set():
            try:
                everything_leaves(other)
                everything_leaves(net)
                if not torch.equal(other(IDS), expected):
                    wrong.append("output")
            except Exception as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in threads:
        thread.start()
    with dynamo_config.patch(error_on_recompile=True):
        try:
            for _ in range(300):
                assert torch.equal(run(IDS), expected)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not wrong
    assert graphs() == 1
