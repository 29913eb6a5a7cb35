"""Tensors that several modules share, whole or as views of one storage, stay one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from ways import IDS, WAYS, Net, check_same, hold, left_memory, make_net

import diskoffload
from diskoffload.residency.held import State

P = torch.nn.Parameter


def tied_views(net: Net) -> None:
    """Assign views of one storage: the same bytes twice, transposed, and a part of them."""
    base = torch.arange(64.0 * 16)
    net.up.weight = P(base.view(64, 16))
    net.down.weight = P(base.view(64, 16).t())
    # A view that is not detached keeps its base, and so the memory, on any module.
    net.register_buffer("part", base[16:48].detach())
    net.register_buffer("again", base.view(64, 16).detach())


def bound(net: Net, key: str) -> object:
    name, _, leaf = key.rpartition(".")
    owner = net.get_submodule(name)
    return dict([*owner._parameters.held_items(), *owner._buffers.held_items()])[leaf]


EDITS: dict[str, Callable[[Net], object]] = {
    "one": lambda net: net.up.weight.mul_(2),
    "the transposed": lambda net: net.down.weight[3].zero_(),
    "a part": lambda net: net.part.add_(1),
    "both": lambda net: (net.again.add_(1), net.up.weight.add_(1)),
    "an update": lambda net: diskoffload.update_offload_parameter(
        net.up, "weight", torch.ones(64, 16)
    ),
    "loading": lambda net: net.load_state_dict({"part": torch.ones(32)}, strict=False),
}
CHANGES: dict[str, Callable[[Net], object]] = {
    "untying": lambda net: setattr(net.up, "weight", P(torch.zeros(64, 16))),
    "untying through data": lambda net: setattr(net.up.weight, "data", torch.zeros(64, 16)),
    "deleting": lambda net: delattr(net.up, "weight"),
    "deleting two": lambda net: (delattr(net.up, "weight"), delattr(net, "again")),
    "None": lambda net: setattr(net, "part", None),
    "another dtype": lambda net: setattr(net, "part", net.part.double()),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_an_edit_of_one_view_is_seen_by_all(net: Net, edit: str) -> None:
    plain = make_net()
    for one in (net, plain):
        tied_views(one)
    for _ in range(2):
        check_same(net, plain)
        for one in (net, plain):
            EDITS[edit](one)
    check_same(net, plain)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_untying_one_leaves_the_others(net: Net, change: str) -> None:
    plain = make_net()
    for one in (net, plain):
        tied_views(one)
        CHANGES[change](one)
    check_same(net, plain)
    for one in (net, plain):
        one.down.weight.add_(3)
    check_same(net, plain)


@torch.no_grad()
def test_views_are_stored_once_and_leave_memory(net: Net, way: str) -> None:
    tied_views(net)
    left_memory(net)
    assert net.up.weight.untyped_storage()._cdata == net.down.weight.untyped_storage()._cdata
    cache = net.up._parameters
    if not isinstance(cache, diskoffload.DiskCache):
        return
    left_memory(net)
    root = bound(net, "up.weight").root
    assert root is bound(net, "down.weight").root is bound(net, "part").root
    assert root.state in (State.BENEATH, State.VACANT)
    written = [
        name
        for shard in cache.folder.shards()
        for name, spec in shard.header.specs.items()
        if spec.nbytes and name in ("up.weight", "down.weight", "part", "again")
    ]
    stored = root.backing.stored.shards
    assert len(stored) == 1
    # "opened" and written shards have the old weights, too; of the new there is one.
    assert written.count("part") + written.count("again") == 0
    del root


def split(net: Net) -> None:
    """Assign parts of one storage that do not overlap: not a tie."""
    parts = torch.arange(64.0 * 16 * 3).view(3, 64, 16)
    net.up.weight = P(parts[0])
    net.register_buffer("first", parts[1].detach())
    net.register_buffer("second", parts[2].detach())


@torch.no_grad()
def test_parts_of_one_storage_are_no_tie_and_leave_memory(net: Net, way: str) -> None:
    plain = make_net()
    for one in (net, plain):
        split(one)
    check_same(net, plain)
    for one in (net, plain):
        one.first.zero_()
        one.up.weight.mul_(2)
    check_same(net, plain)
    held = torch.arange(10.0)
    for one in (net, plain):
        one.first = held[:5].clone()[:4]  # not detached: stays in memory, and right
        one.second = held.clone()[5:].detach()
    check_same(net, plain, in_use=("first",))
    if not isinstance(net.up._parameters, diskoffload.DiskCache):
        return
    assert bound(net, "first").root is bound(net, "first")


@torch.no_grad()
def test_what_someone_else_holds_of_a_storage_stays(net: Net) -> None:
    base = torch.arange(128.0)
    net.register_buffer("first", base[:64])
    net.register_buffer("second", base[64:])
    left_memory(net)
    base.mul_(2)
    assert net.first[3] == 6
    left_memory(net)
    base[100] = -1
    del base
    left_memory(net)
    left_memory(net)
    assert net.second[36] == -1
    assert net.first[3] == 6


@torch.no_grad()
def test_a_view_of_a_weight_that_is_offloaded_is_a_tie(net: Net, way: str) -> None:
    if way.endswith("elsewhere"):
        pytest.skip("a read from another device is a copy, and a view of that is its own")
    plain = make_net()
    for one in (net, plain):
        one.down.weight = P(one.up.weight.data.view(16, 64))
        one.up.weight.add_(1)
    check_same(net, plain)
    for one in (net, plain):
        one.down.weight.mul_(3)
    check_same(net, plain)
    for one in (net, plain):
        one.norm.bias.data = one.norm.weight.data
        one.norm.bias.add_(5)
    check_same(net, plain)
    for one in (net, plain):
        one.norm.weight.mul_(5)
    check_same(net, plain)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("opened")])
@torch.no_grad()
def test_modules_offloaded_after_they_were_tied(way: str, tmp_path: Path) -> None:
    net, plain = make_net(), make_net()
    for one in (net, plain):
        tied_views(one)
    net = hold(net, way, tmp_path)
    check_same(net, plain)
    for one in (net, plain):
        one.up.weight.add_(1)
        one.part.zero_()
    check_same(net, plain)


@pytest.mark.parametrize("budget", ["0B", "3KB", "1GB"])
@torch.no_grad()
def test_ties_survive_dispatch_and_its_end(net: Net, budget: str, tmp_path: Path) -> None:
    plain = make_net()
    for one in (net, plain):
        tied_views(one)
    options = {"max_memory": {"cpu": budget}, "offload_dir": tmp_path / "dispatched"}
    diskoffload.dispatch_model(net, **options)
    check_same(net, plain, in_use=("up.weight", "down.weight", "part", "again"))
    for one in (net, plain):
        one.down.weight.add_(1)
        one.head.weight.mul_(2)
    check_same(net, plain, in_use=("up.weight", "down.weight", "part", "again"))
    for onload_tensors in (True, False):
        diskoffload.remove_dispatch(net, onload_tensors)
        gc.collect()
        for one in (net, plain):
            one.part.add_(1)
            one.head.weight.mul_(2)
        check_same(net, plain)
        assert net.head.weight is net.embed.weight
        diskoffload.dispatch_model(net, **options)


@torch.no_grad()
def test_a_copy_has_ties_of_its_own(net: Net, way: str) -> None:
    if way == "plain":
        pytest.skip("torch's own deepcopy unties parameters that are views of one storage")
    plain = make_net()
    for one in (net, plain):
        tied_views(one)
    left_memory(net)
    for edited in (False, True):
        twin_of_plain = make_net()
        tied_views(twin_of_plain)
        if edited:
            for one in (net, plain, twin_of_plain):
                one.up.weight.add_(1)
        twins = [copy.deepcopy(net), twin_of_plain]
        check_same(*twins)
        for one in twins:
            one.part.zero_()
            one.down.weight.add_(2)
            one.embed.weight.zero_()
        check_same(*twins)
        check_same(net, plain)
        del twins, one


@torch.no_grad()
def test_views_are_saved(net: Net, tmp_path: Path) -> None:
    tied_views(net)
    net.again.add_(1)
    diskoffload.save_checkpoint(net, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    base = torch.arange(64.0 * 16) + 1
    if isinstance(net.up._parameters, diskoffload.OffloadCache):
        assert ("up.weight" in saved) != ("again" in saved)  # one tensor under two names
    assert torch.equal(saved.get("up.weight", saved.get("again")), base.view(64, 16))
    assert torch.equal(saved["down.weight"], base.view(64, 16).t())
    assert torch.equal(saved["part"], base[16:48])


def test_gradients_of_tied_views(net: Net) -> None:
    plain = make_net()
    for one in (net, plain):
        tied_views(one)
        one.double()
    left_memory(net)
    for one in (net, plain):
        one(IDS).square().sum().backward()
    for (name, mine), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
