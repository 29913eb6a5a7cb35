"""torch.compile of an offloaded module: once, and right whatever happens afterwards."""

from __future__ import annotations

from collections.abc import Callable
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
    slow,
    with_tiny_budget,
)
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from transformers import LlamaConfig, LlamaForCausalLM
from ways import IDS, Net, hold, left_memory, make_net

import diskoffload
from diskoffload.residency.held import State

__all__ = ["compiler_files", "fresh_compiler"]  # fixtures


@torch.no_grad()
def test_compiled_once_and_right_whatever_leaves_memory(net: Net, way: str) -> None:
    plain = make_net()
    with_tiny_budget(net)
    if way != "disk":  # whose writes are to be awaited
        everything_leaves(net)
    run = compiled(net)
    assert torch.equal(run(IDS), plain(IDS))
    with dynamo_config.patch(error_on_recompile=True):
        for _ in range(2):
            everything_leaves(net)
            assert torch.equal(run(IDS), plain(IDS))
            assert torch.equal(net(IDS), plain(IDS))
        with diskoffload.disable_offloading():
            assert torch.equal(run(IDS), plain(IDS))
        with diskoffload.disable_onloading():
            assert torch.equal(run(IDS), plain(IDS))
    assert graphs() == 1
    if way in ("disk", "disk-written", "opened"):  # it was written before it was kept
        for module in net.modules():
            for _, held in module._parameters.held_items():
                assert held is None or held.state is State.BENEATH, held


EDITS: list[Callable[[Net], object]] = [
    lambda net: net.up.weight.mul_(2),
    lambda net: net.up.weight.data[0].fill_(3),
    lambda net: diskoffload.update_offload_parameter(net.down, "weight", torch.ones(64)),
    lambda net: setattr(net.down, "weight", torch.nn.Parameter(torch.full((16, 64), 0.1))),
    lambda net: net.down.weight.add_(1),
    lambda net: setattr(net, "scale", torch.arange(16.0)),
    lambda net: net.load_state_dict(make_net(2).state_dict()),
    lambda net: net.up.load_state_dict(make_net(3).up.state_dict(), assign=True),
]


@torch.no_grad()
@quick_on("plain", "disk", "cpu-elsewhere", "zstd-written", "opened-cast")
def test_compiled_code_sees_edits_and_replaced_parameters(net: Net) -> None:
    plain = make_net()
    with_tiny_budget(net)
    run = compiled(net)
    before = run(IDS)
    with dynamo_config.patch(error_on_recompile=True):
        for edit in EDITS:
            edit(net)
            edit(plain)
            assert torch.equal(run(IDS), plain(IDS))
            everything_leaves(net)
            assert torch.equal(run(IDS), plain(IDS))
    assert graphs() == 1
    assert not torch.equal(before, run(IDS))


@torch.no_grad()
@quick_on("zstd-written")
def test_what_makes_another_program_is_compiled_anew(net: Net) -> None:
    plain = make_net()
    run, plain_run = compiled(net), compiled(plain)
    assert torch.equal(run(IDS), plain_run(IDS))
    made = graphs()
    for one in (net, plain):
        one.up.bias = None
        one.down.weight = torch.nn.Parameter(torch.ones(8, 64))
        one.head.weight = torch.nn.Parameter(torch.ones(4, 8))  # no tie any more
    for _ in range(2):
        assert torch.equal(run(IDS), plain_run(IDS))
        everything_leaves(net)
    assert graphs() == 2 * made
    del net.up.weight, plain.up.weight
    for gone in (run, plain_run):
        with pytest.raises((AttributeError, torch._dynamo.exc.Unsupported), match="weight"):
            gone(IDS)


def trained(net: Net, between: Callable[[Net], None]) -> dict[str, torch.Tensor]:
    """Train under compile, and give what came of it."""
    net.train()
    run = compiled(net, "aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = run(IDS).square().mean()
        between(net)
        loss.backward()
        optimizer.step()
        between(net)
    return {name: value.clone() for name, value in net.state_dict().items()}


@quick_on("plain", "disk", "zstd-written")
def test_training_under_compile_is_the_plain_modules(net: Net) -> None:
    if not EXPECTED:
        EXPECTED.update(trained(make_net(), lambda net: None))
        torch._dynamo.reset()
        counters.clear()
    with_tiny_budget(net)
    for name, value in trained(net, everything_leaves).items():
        assert torch.equal(value, EXPECTED[name]), name
    assert graphs() == 1


EXPECTED: dict[str, torch.Tensor] = {}


@torch.no_grad()
@quick_on("disk", "zstd-written", "opened-cast")
def test_compiled_before_it_was_offloaded_and_after_it_no_longer_is(
    way: str, tmp_path: Path
) -> None:
    plain = make_net()
    opened = way.startswith("opened")
    net = hold(make_net(), way, tmp_path) if opened else make_net()
    run = compiled(net)
    assert torch.equal(run(IDS), plain(IDS))
    if not opened:
        hold(net, way, tmp_path)
        assert torch.equal(run(IDS), plain(IDS))
    diskoffload.remove_dispatch(net)
    for one in (net, plain):
        one.up.weight.zero_()
    assert torch.equal(run(IDS), plain(IDS))
    assert not counters["graph_break"]


def need_cpp_compiler() -> None:
    try:
        get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler as error:
        pytest.skip(f"the default backend needs a C++ compiler: {error}")


@torch.no_grad()
@pytest.mark.slow
def test_the_default_backend(net: Net) -> None:
    need_cpp_compiler()
    plain = make_net()
    with_tiny_budget(net)
    run, plain_run = compiled(net, "inductor"), compiled(plain, "inductor")
    run(IDS), plain_run(IDS)
    made = graphs()
    with dynamo_config.patch(error_on_recompile=True):
        for edit in EDITS:
            everything_leaves(net)
            assert torch.equal(run(IDS), plain_run(IDS))
            edit(net)
            edit(plain)
            assert torch.equal(run(IDS), plain_run(IDS))
    assert graphs() == made


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, *map(slow, [{"dtype": torch.float64}])])
def test_a_causal_model(tmp_path: Path, options: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    plain = LlamaForCausalLM(config).to(**options).eval()
    plain.save_pretrained(tmp_path / "checkpoint")
    model = diskoffload.open_checkpoint(
        tmp_path / "checkpoint", offload_dir=tmp_path / "offload", **options
    )
    model.lm_head._parameters.residency.max_bytes = 1
    run, ids, options = compiled(model), IDS.reshape(2, 16), {"use_cache": False}
    expected = plain(ids).logits
    with dynamo_config.patch(recompile_limit=1):
        for _ in range(2):
            assert torch.equal(run(ids, **options).logits, expected)
            left_memory(model)
    assert graphs() == 1
    program = torch.export.export(model, (ids,), options)
    left_memory(model)
    assert torch.equal(program.module()(ids, **options).logits, expected)
