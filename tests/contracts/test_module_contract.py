"""Whatever a user does to a plain module gives the same on an offloaded one."""

from __future__ import annotations

import copy
import gc
import inspect
from pathlib import Path

import pytest
import torch
from ways import DISK_WAYS, Net, hold, make_net, written

import diskoffload

IDS = torch.arange(32).reshape(2, 16) % 32


def test_values_and_outputs_are_the_plain_modules(net: Net) -> None:
    plain = make_net()
    for (name, one), (other_name, other) in zip(
        net.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    ids = IDS.reshape(-1)
    with torch.no_grad():
        assert torch.equal(net(ids), plain(ids))
        assert torch.equal(net(ids), plain(ids))  # and again, when all of it is in memory


def test_an_entry_is_one_object_for_life(net: Net) -> None:
    first = net.up.weight
    identity = id(first)
    assert isinstance(first, torch.nn.Parameter)
    assert first.requires_grad
    first.note = "kept"
    del first
    net(IDS.reshape(-1))
    written(net)
    assert id(net.up.weight) == identity
    assert net.up.weight.note == "kept"
    assert dict(net.named_parameters())["up.weight"] is net.up.weight


def test_ties_stay_ties(net: Net) -> None:
    assert net.head.weight is net.embed.weight
    assert "head.weight" not in dict(net.named_parameters())
    with torch.no_grad():
        net.head.weight[3] = 7
    assert (net.embed.weight[3] == 7).all()
    net.head.weight = torch.nn.Parameter(torch.zeros(32, 16))
    assert (net.embed.weight[3] == 7).all()
    assert not net.head.weight.any()


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: net.up.weight.mul_(2),
        lambda net: net.up.weight.data.add_(1),
        lambda net: net.up.weight.detach().zero_(),
        lambda net: net.up.weight.__setitem__(0, 5),
        lambda net: torch.nn.init.constant_(net.up.bias, 3),
        lambda net: net.scale.copy_(torch.arange(16.0)),
        lambda net: net.norm.running_mean.add_(1),
        lambda net: net.load_state_dict({"up.bias": torch.ones(64)}, strict=False),
        lambda net: diskoffload.update_offload_parameter(net.up, "weight", torch.ones(64, 16)),
        lambda net: diskoffload.update_offload_parameter(net.up, "weight", torch.ones(16)),
        lambda net: setattr(net.up.weight, "data", torch.ones(64, 16)),
        lambda net: net.up.register_parameter("bias", None),
        lambda net: net.register_buffer("more", torch.ones(3)),
        lambda net: setattr(net.up, "weight", torch.nn.Parameter(torch.ones(64, 16))),
        lambda net: setattr(net, "scale", torch.ones(16)),
        lambda net: net.half(),
        lambda net: net.to(torch.float64),
        lambda net: net.requires_grad_(False),
    ],
)
@torch.no_grad()
def test_an_edit_is_seen_later_and_survives_leaving_memory(net: Net, edit: object) -> None:
    plain = make_net()
    edit(plain)
    edit(net)
    for _ in range(2):
        state = plain.state_dict()
        assert net.state_dict().keys() == state.keys()
        for name, value in net.state_dict().items():
            assert value.dtype == state[name].dtype, name
            assert torch.equal(value, state[name]), name
        for (name, mine), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert mine.requires_grad == theirs.requires_grad, name
        del value, mine
        gc.collect()
        written(net)


@torch.no_grad()
def test_an_edit_through_a_kept_view_is_seen(net: Net) -> None:
    view = net.up.weight[1]
    written(net)
    view.fill_(9)
    assert (net.up.weight[1] == 9).all()
    written(net)
    view.fill_(10)
    del view
    written(net)
    written(net)
    assert (net.up.weight[1] == 10).all()


@torch.no_grad()
def test_a_tensor_read_before_an_assignment_keeps_its_value(net: Net) -> None:
    before = net.up.weight
    value = before.clone()
    net.up.weight = torch.nn.Parameter(torch.zeros(64, 16))
    written(net)
    assert torch.equal(before, value)
    assert not net.up.weight.any()


@torch.no_grad()
def test_an_assigned_parameter_becomes_the_entry(net: Net) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 16), requires_grad=False)
    net.up.weight = parameter
    assert net.up.weight is parameter
    parameter.add_(4)
    written(net)
    assert net.up.weight is parameter
    assert (net.up.weight == 4).all()
    assert not net.up.weight.requires_grad


@torch.no_grad()
def test_update_takes_the_value_at_the_call(net: Net) -> None:
    before = net.down.weight
    data = torch.ones(16, 64)
    diskoffload.update_offload_parameter(net.down, "weight", data)
    data.zero_()
    assert (net.down.weight == 1).all()
    assert (before == 1).all()  # as copy_ does on a plain module
    diskoffload.update_offload_parameter(net.down, "weight", net.down.weight)
    assert (net.down.weight == 1).all()
    with pytest.raises(AttributeError, match="no parameter or buffer 'nothing'"):
        diskoffload.update_offload_parameter(net.down, "nothing", data)
    with pytest.raises(RuntimeError):
        diskoffload.update_offload_parameter(net.down, "weight", torch.ones(5, 5))
    assert (net.down.weight == 1).all()


def test_none_and_back_and_delete(net: Net) -> None:
    net.up.bias = None
    assert net.up.bias is None
    assert "up.bias" not in net.state_dict()
    net(IDS.reshape(-1))
    net.up.bias = torch.nn.Parameter(torch.ones(64))
    assert net.up.bias.sum() == 64
    del net.up.bias
    assert not hasattr(net.up, "bias")
    with pytest.raises(TypeError):
        net.up.weight = "text"
    assert net.up.weight.shape == (64, 16)


def test_gradients_are_the_plain_modules(net: Net) -> None:
    plain = make_net()
    ids = IDS.reshape(-1)
    for _ in range(2):  # the second pass accumulates
        plain(ids).square().sum().backward()
        net(ids).square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_training_steps_are_the_plain_modules(net: Net, make: type) -> None:
    plain = make_net()
    ids = IDS.reshape(-1)
    nets = [net.train(), plain.train()]
    optimizers = [make(one.parameters(), lr=0.1) for one in nets]
    for _ in range(3):
        for one, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            one(ids).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
        written(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_functional_call_changes_nothing_and_keeps_its_gradient(net: Net) -> None:
    ids = IDS.reshape(-1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mine = {name: torch.zeros_like(p, requires_grad=True) for name, p in net.named_parameters()}
    torch.func.functional_call(net, mine, (ids,)).sum().backward()
    assert any(value.grad is not None for value in mine.values())
    frozen = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    assert not torch.func.functional_call(net, frozen, (ids,)).any()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_submodules_hooks_and_attributes_can_be_added(net: Net) -> None:
    calls = []
    net.up.register_forward_hook(lambda *args: calls.append("hook"))
    net.up.register_forward_pre_hook(lambda *args: calls.append("pre"))
    diskoffload.register_offload_module(net.up, "extra", torch.nn.Linear(2, 2))
    assert isinstance(net.up.extra.weight, torch.nn.Parameter)
    assert type(net.up.extra._parameters) is type(net.up._parameters)
    torch.nn.utils.parametrize.register_parametrization(net.down, "weight", _Double())
    assert torch.equal(net.down.weight, 2 * make_net().down.weight)
    net(IDS.reshape(-1))
    assert calls == ["pre", "hook"]


class _Double(torch.nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value


def test_forward_keeps_its_signature_and_can_be_unwrapped(net: Net, way: str) -> None:
    assert inspect.signature(net.up.forward) == inspect.signature(make_net().up.forward)
    wrapped = net.up.forward
    with diskoffload.unwrap_offload_forward(net.up):
        assert net.up.forward.__func__ is torch.nn.Linear.forward
    assert inspect.signature(net.up.forward) == inspect.signature(wrapped)

    def doubled(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.Linear.forward(self, input)

    ones = torch.ones(1, 16)
    expected = 2 * net.up(ones)
    with diskoffload.unwrap_offload_forward(net.up):
        net.up.forward = doubled.__get__(net.up)
    assert torch.equal(net.up(ones), expected)
    diskoffload.remove_module_offload(net.up)
    assert torch.equal(net.up(ones), expected)


@pytest.mark.parametrize("onload_tensors", [False, True])
def test_removing_gives_back_a_plain_module(net: Net, onload_tensors: bool) -> None:
    objects = dict(net.named_parameters())
    with torch.no_grad():
        net.up.weight[0] = 3
    diskoffload.remove_dispatch(net, onload_tensors)
    plain = make_net()
    with torch.no_grad():
        plain.up.weight[0] = 3
    gc.collect()
    for module in net.modules():
        assert type(module._parameters) is dict
        assert type(module._buffers) is dict
        assert not module.__dict__.keys() & {"forward", "_original_forward_func"}
    for name, parameter in net.named_parameters():
        assert parameter is objects[name]
    for name, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert net.head.weight is net.embed.weight


def test_deepcopy_is_independent(net: Net) -> None:
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.up.weight.zero_()
        net.down.weight.zero_()
    assert net.up.weight.any()
    assert twin.down.weight.any()
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not net.head.weight
    ids = IDS.reshape(-1)
    assert twin(ids).shape == net(ids).shape


def test_state_dict_saves_and_loads(net: Net, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 100_000  # each tensor alone, no whole shard
    other = make_net(1)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for name, value in other.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(net: Net, assign: bool) -> None:
    state = make_net(1).state_dict()
    net.load_state_dict(state, assign=assign)
    written(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_modes(net: Net, way: str) -> None:
    if way == "plain":
        pytest.skip("a plain module has no modes")
    cache = net.up._parameters
    with diskoffload.disable_offloading():
        with diskoffload.disable_offloading():
            first = net.up.weight
            kept = dict(diskoffload.OffloadCache.keep_onloaded_values)
            assert kept.popitem()[1] is first
        assert len(diskoffload.OffloadCache.keep_onloaded_values) == 1
        assert diskoffload.OffloadCache.offloading_disabled
    assert len(diskoffload.OffloadCache.keep_onloaded_values) == 0
    with diskoffload.disable_onloading():
        offloaded = net.up.weight
        assert offloaded is cache.offloaded_values["weight"]
        assert offloaded.shape == (64, 16)
        assert isinstance(offloaded, torch.nn.Parameter)
        assert (offloaded.device.type == "meta") == (way in DISK_WAYS)
        net.down.weight = offloaded  # assigned as it is: now a tie
    assert net.down.weight is net.up.weight
    with pytest.raises(ZeroDivisionError), diskoffload.disable_offloading():
        1 / 0  # noqa: B018
    assert not diskoffload.OffloadCache.offloading_disabled


def test_align_module_device(net: Net) -> None:
    with diskoffload.align_modules([net.up, net.down], "cpu"), torch.no_grad():
        net.up.weight.fill_(1)
        net.down.weight.fill_(2)
    assert (net.up.weight == 1).all()
    assert (net.down.weight == 2).all()


def test_offloading_twice_is_an_error(net: Net, way: str) -> None:
    if way == "plain":
        pytest.skip("it is not offloaded once")
    with pytest.raises(diskoffload.AlreadyOffloadedError, match="remove_module_offload"):
        diskoffload.offload_module(net.up, "cpu", "cpu")
    assert net.up.weight.shape == (64, 16)


def test_the_users_checkpoint_never_changes(way: str, tmp_path: Path) -> None:
    if not way.startswith("opened"):
        pytest.skip("there is no checkpoint")
    net = hold(make_net(), way, tmp_path)
    file = tmp_path / "checkpoint" / "model.safetensors"
    before = file.read_bytes()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    written(net)
    diskoffload.save_checkpoint(net, tmp_path / "out")
    assert file.read_bytes() == before
