"""Exported programs, traced scripts and fx graphs hold the tensors of an offloaded module."""

from __future__ import annotations

import pytest
import torch
from compiling import compiler_files, everything_leaves, fresh_compiler, with_tiny_budget
from ways import IDS, Net, make_net

import diskoffload

__all__ = ["compiler_files", "fresh_compiler"]  # fixtures


def check_export(net: Net, strict: bool) -> None:
    plain = make_net()
    with_tiny_budget(net)
    if strict not in PLAIN_PROGRAMS:
        PLAIN_PROGRAMS[strict] = torch.export.export(plain, (IDS,), strict=strict)
    expected = PLAIN_PROGRAMS[strict]
    program = torch.export.export(net, (IDS,), strict=strict)
    assert program.state_dict.keys() == expected.state_dict.keys()
    signature = program.graph_signature
    assert signature.parameters == expected.graph_signature.parameters
    assert signature.buffers == expected.graph_signature.buffers
    assert program.state_dict["up.weight"] is net.up.weight
    module = program.module()
    assert [str(node.target) for node in module.graph.nodes] == [
        str(node.target) for node in expected.module().graph.nodes
    ]
    for _ in range(2):
        everything_leaves(net)
        assert torch.equal(module(IDS), plain(IDS))
        for one in (net, plain):
            one.up.weight.mul_(2)
            one.norm.running_mean.add_(1)
    assert torch.equal(net(IDS), plain(IDS))


PLAIN_PROGRAMS: dict[bool, torch.export.ExportedProgram] = {}


@torch.no_grad()
def test_an_exported_program_holds_the_tensors_themselves(net: Net) -> None:
    check_export(net, strict=False)


@torch.no_grad()
@pytest.mark.parametrize("way", ["disk", "zstd-written"])
def test_so_does_a_strictly_exported_one(net: Net) -> None:
    check_export(net, strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", ["disk", "zstd-written", "opened"])
def test_export_inside_disable_onloading_is_refused(net: Net, strict: bool) -> None:
    everything_leaves(net)
    with diskoffload.disable_onloading():
        assert net.scale.shape == (16,)
        with pytest.raises(diskoffload.UnsupportedError, match="outside of it"):
            torch.export.export(net, (IDS,), strict=strict)
    assert torch.equal(net(IDS), make_net()(IDS))


@torch.no_grad()
def test_a_traced_script_holds_the_tensors_themselves(net: Net) -> None:
    plain = make_net()
    with_tiny_budget(net)
    script = torch.jit.trace(net, IDS, check_trace=False)
    assert {name for name, _ in script.named_parameters()} == {
        name for name, _ in plain.named_parameters()
    }
    for _ in range(2):
        everything_leaves(net)
        assert torch.equal(script(IDS), plain(IDS))
        for one in (net, plain):
            one.up.weight.mul_(2)
    assert torch.equal(net(IDS), plain(IDS))


@torch.no_grad()
def test_fx_gives_the_plain_modules_graph(net: Net) -> None:
    plain = make_net()
    with_tiny_budget(net)
    traced, expected = torch.fx.symbolic_trace(net), torch.fx.symbolic_trace(plain)
    assert str(traced.graph) == str(expected.graph)
    for _ in range(2):
        everything_leaves(net)
        assert torch.equal(traced(IDS), plain(IDS))
        for one in (net, plain):
            one.up.weight.mul_(2)
            one.scale.add_(1)
    assert torch.equal(net(IDS), plain(IDS))
