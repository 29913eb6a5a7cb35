"""An edit in place is never lost, however it is made and however the tensor is held.

All of it runs once more where the kernel does not say which pages were written (macOS, gVisor,
after setuid), on the ways that would ask it.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parametrizations, prune
from ways import IDS, WAYS, Net, check_same, hold, left_memory, make_net

import diskoffload

_BLIND = "-blind"


@pytest.fixture(params=[*WAYS, f"disk-written{_BLIND}", f"opened{_BLIND}"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param.endswith(_BLIND):
        for asker in ("cache.disk_backing", "residency.edits"):
            monkeypatch.setattr(f"diskoffload.{asker}.written_pages", lambda *_: None)
    return request.param.removesuffix(_BLIND)


def step(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(IDS).square().sum().backward()
    optimizer.step()
    net.zero_grad()


def old_weight_norm(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(net.up)
    step(net)
    torch.nn.utils.remove_weight_norm(net.up)


def pruned(net: Net) -> None:
    prune.l1_unstructured(net.up, "weight", 0.5)
    step(net)
    prune.remove(net.up, "weight")


def normed(net: Net) -> None:
    parametrizations.weight_norm(net.up)
    step(net)


def from_vector(net: Net) -> None:
    vector = torch.nn.utils.parameters_to_vector(net.parameters()).detach() * 2
    torch.nn.utils.vector_to_parameters(vector, net.parameters())


@torch.no_grad()
def initialized(net: Net) -> None:
    def fill(module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.constant_(module.weight, 2)

    net.apply(fill)


@torch.no_grad()
def foreach(net: Net) -> None:
    torch._foreach_mul_(list(net.parameters()), 3)


@torch.no_grad()
def out_argument(net: Net) -> None:
    torch.add(net.up.weight.clone(), 1, out=net.up.weight)


@pytest.mark.parametrize(
    "edit",
    [old_weight_norm, normed, pruned, from_vector, initialized, foreach, out_argument, step],
)
def test_what_torch_edits_itself(net: Net, edit: Any) -> None:
    plain = make_net()
    for one in (net, plain):
        edit(one)
    check_same(net, plain)


CONTEXTS = {
    "disable_offloading": lambda net: diskoffload.disable_offloading(),
    "align_module_device": lambda net: diskoffload.align_module_device(net.up),
    "align_modules": lambda net: diskoffload.align_modules([net.up, net.down]),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("fails", [False, True])
def test_edits_inside_a_context(net: Net, context: str, fails: bool) -> None:
    plain = make_net()

    @torch.no_grad()
    def edit(one: Net) -> None:
        one.up.weight.mul_(3)
        one.up.weight.data.add_(1)
        one.up.bias[2:5] = 4

    edit(plain)
    try:
        with CONTEXTS[context](net):
            edit(net)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert not diskoffload.OffloadCache.offloading_disabled
    check_same(net, plain)


@torch.no_grad()
def test_edits_are_seen_by_every_tensor_read_earlier(net: Net) -> None:
    weight = net.up.weight
    others = [weight.data, weight.detach(), net.up.weight.view(-1).view(64, 16)]
    part = weight[1:3]
    for _ in range(2):
        net.up.weight.mul_(2)
        assert all(torch.equal(other, weight) for other in others)
        assert torch.equal(part, net.up.weight[1:3])
        left_memory(net)
    others[0].add_(1)
    assert torch.equal(net.up.weight, others[0])
    expected = weight.clone()
    del weight, others
    left_memory(net)
    part.zero_()
    expected[1:3] = 0
    left_memory(net)
    assert torch.equal(net.up.weight, expected)
    del part
    left_memory(net)
    assert torch.equal(net.up.weight, expected)


@torch.no_grad()
def test_two_tensors_on_one_page_keep_each_others_edits(way: str, tmp_path: Path) -> None:
    plain, net = make_net(), hold(make_net(), way, tmp_path)
    left_memory(net)
    names = ["up.bias", "scale", "norm.bias", "norm.running_mean"]  # 64 to 256 bytes each
    for number, name in enumerate([*names, *reversed(names)]):
        for one in (plain, net):
            dict(one.state_dict())[name].add_(number + 1)
        if number % 2:
            left_memory(net)
    check_same(net, plain)


@torch.no_grad()
def test_writers_that_torch_does_not_see(net: Net) -> None:
    rows = net.up.weight.detach().numpy()
    rows[0] = 7
    assert (net.up.weight[0] == 7).all()
    left_memory(net)
    rows[1] = 8
    shared = torch.utils.dlpack.from_dlpack(net.up.weight.detach())
    del rows
    left_memory(net)
    shared[2] = 9
    left_memory(net)
    shared[3] = 10
    del shared
    left_memory(net)
    assert net.up.weight[:4, 0].tolist() == [7, 8, 9, 10]
    weight = net.up.weight  # a pointer is good as long as the tensor that gave it is held
    ctypes.memset(weight.data_ptr(), 0, 4 * 16)
    del weight
    left_memory(net)
    assert net.up.weight[:2, 0].tolist() == [0, 8]


@torch.no_grad()
def test_an_alias_of_what_a_parameter_was_made_from(net: Net, way: str) -> None:
    if way.endswith("elsewhere"):
        pytest.skip("reading brings the parameter to another device, without its alias")
    raw = torch.ones(64, 16)
    net.up.weight = torch.nn.Parameter(raw)
    left_memory(net)
    raw.fill_(5)
    assert (net.up.weight == 5).all()
    left_memory(net)
    raw.fill_(6)
    del raw
    left_memory(net)
    assert (net.up.weight == 6).all()


@torch.no_grad()
def test_edits_are_saved(net: Net, tmp_path: Path) -> None:
    plain = make_net()
    for one in (net, plain):
        one.up.weight.data.mul_(2)
        one.norm.running_mean.add_(1)
        one.embed.weight[3] = 0
    diskoffload.save_checkpoint(net, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in plain.state_dict().items():
        tie = {"head.weight": "embed.weight", "embed.weight": "head.weight"}.get(name, name)
        assert torch.equal(saved[name if name in saved else tie], value), name
    assert ("head.weight" in saved) != ("embed.weight" in saved)


@torch.no_grad()
def test_after_closing_tensors_stay_readable_and_assignment_raises(net: Net, way: str) -> None:
    cache = net.up._parameters
    if not isinstance(cache, diskoffload.DiskCache):
        pytest.skip("there is no folder to close")
    before, plain = net.up.weight, make_net()
    net.norm.bias.fill_(3)
    cache.sync()
    cache.folder.close()
    assert torch.equal(before, plain.up.weight)
    assert torch.equal(net.down.weight, plain.down.weight)
    assert (net.norm.bias == 3).all()
    with pytest.raises(diskoffload.ClosedError, match="closed"):
        net.up.weight = torch.nn.Parameter(torch.zeros(64, 16))
    with pytest.raises(diskoffload.ClosedError, match="closed"):
        diskoffload.update_offload_parameter(net.down, "weight", torch.zeros(16, 64))
    gc.collect()
    assert torch.equal(net.down.weight, plain.down.weight)
    assert torch.equal(net.up.weight, plain.up.weight)


def test_an_edit_that_autograd_must_know_of_is_an_error(net: Net) -> None:
    loss = net(IDS).square().sum()
    with torch.no_grad():
        net.down.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
