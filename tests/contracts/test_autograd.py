"""Gradients of an offloaded model are the plain model's, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from ways import IDS, Net, check_same, left_memory, make_net

import diskoffload


def compare_gradients(net: Net, plain: Net) -> None:
    for (name, mine), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert torch.equal(mine.grad, theirs.grad), name


def widened(net: Net) -> Net:
    """Give weights of another width, which no file aligns wrongly: sums are the same bits."""
    return net.double()


LOSSES: dict[str, Callable[[Net], torch.Tensor]] = {
    "plain": lambda net: net(IDS).square().sum(),
    "checkpointed": lambda net: checkpoint(net, IDS, use_reentrant=False).square().sum(),
    "checkpointed part": lambda net: (
        checkpoint(lambda x: net.down(torch.relu(net.up(x))), net.embed(IDS), use_reentrant=False)
        .square()
        .sum()
    ),
    "twice in one graph": lambda net: (net(IDS) * net(IDS.flip(0))).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_accumulate_over_steps(net: Net, loss: str) -> None:
    plain = widened(make_net())
    widened(net)
    left_memory(net)
    for _ in range(2):
        for one in (net, plain):
            LOSSES[loss](one).backward()
        left_memory(net)
    compare_gradients(net, plain)
    for one in (net, plain):
        one.zero_grad()
    compare_gradients(net, plain)


def test_what_autograd_saved_is_never_taken_away(net: Net) -> None:
    plain = widened(make_net())
    widened(net)
    left_memory(net)
    losses = [one(IDS).square().sum() for one in (net, plain)]
    cache = net.up._parameters
    gc.collect()
    left_memory(net)  # nothing refers to the weights any more but the graph
    if isinstance(cache, diskoffload.OffloadCache):
        cache.residency.make_room(1 << 60)
    for loss in losses:
        loss.backward()
    compare_gradients(net, plain)
    del losses, loss
    if isinstance(cache, diskoffload.DiskCache):
        check_same(net, plain)


def test_gradients_of_gradients(net: Net) -> None:
    plain = widened(make_net())
    widened(net)
    for one in (net, plain):
        (first,) = torch.autograd.grad(LOSSES["plain"](one), one.up.weight, create_graph=True)
        left_memory(net)
        first.square().sum().backward()
    compare_gradients(net, plain)


def test_hooks_of_a_tensor_stay_with_it(net: Net) -> None:
    seen = []
    net.up.weight.register_hook(lambda gradient: seen.append("hook"))
    net.up.weight.register_post_accumulate_grad_hook(lambda tensor: seen.append("accumulated"))
    left_memory(net)
    net(IDS).sum().backward()
    assert seen == ["hook", "accumulated"]


class Adapted(torch.nn.Module):
    """A linear layer with a trainable low-rank addition, as LoRA has it."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        torch.manual_seed(1)
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.base(value) + self.up(self.down(value))


def test_low_rank_training_over_a_frozen_base(net: Net) -> None:
    plain = widened(make_net())
    widened(net)
    left_memory(net)
    optimizers = []
    for one in (net, plain):
        one.requires_grad_(False)
        one.up, one.down = Adapted(one.up), Adapted(one.down)
        trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
        assert len(trained) == 4
        optimizers.append(torch.optim.AdamW(trained, lr=0.1))
    before = net.up.base.weight.detach().clone()
    for _ in range(3):
        for one, optimizer in zip((net, plain), optimizers, strict=True):
            LOSSES["plain"](one).backward()
            optimizer.step()
            optimizer.zero_grad()
        left_memory(net)
    assert torch.equal(net.up.base.weight, before)
    check_same(net, plain)


def test_vmap_and_grad_over_a_functional_call(net: Net) -> None:
    plain = widened(make_net())
    widened(net)
    left_memory(net)
    found = []
    for one in (net, plain):
        buffers = dict(one.named_buffers())
        parameters = {name: value.detach() for name, value in one.named_parameters()}
        stacked = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}

        def call(
            given: dict[str, torch.Tensor],
            one: Net = one,
            buffers: dict[str, torch.Tensor] = buffers,
        ) -> torch.Tensor:
            return functional_call(one, (given, buffers), (IDS,)).square().sum()

        found.append((vmap(call)(stacked), grad(call)(parameters)))
    assert torch.allclose(found[0][0], found[1][0])
    for name, value in found[1][1].items():
        assert torch.equal(found[0][1][name], value), name
    del buffers, parameters, stacked, call
    check_same(net, plain)
