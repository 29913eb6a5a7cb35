"""What happens to modules in their life happens to offloaded ones, too."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from ways import IDS, Net, check_same, hold, left_memory, make_net

import diskoffload


def is_plain(net: torch.nn.Module) -> bool:
    return all(
        type(module._parameters) is dict
        and type(module._buffers) is dict
        and not module.__dict__.keys() & {"forward", "__reduce_ex__", "_original_forward_func"}
        and not [key for key in module.__dict__ if key.startswith("_offload")]
        for module in net.modules()
    )


CONVERSIONS = {
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "to float64": lambda net: net.to(torch.float64),
    "half and back": lambda net: net.half().float(),
    "cpu": lambda net: net.cpu(),
    "to cpu": lambda net: net.to("cpu"),
    "type": lambda net: net.type(torch.float64),
    "frozen": lambda net: net.requires_grad_(False),
    "apply": lambda net: net.apply(
        lambda module: module.requires_grad_(False) if isinstance(module, torch.nn.Linear) else None
    ),
    "train": lambda net: net.train(),
    "meta": lambda net: net.to("meta"),
    "empty": lambda net: net.to_empty(device="meta"),
}


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions(net: Net, conversion: str, swaps: bool) -> None:
    plain = make_net()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        for one in (net, plain):
            CONVERSIONS[conversion](one)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    mine, theirs = dict(net.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert parameter.requires_grad == theirs[name].requires_grad, name
        assert parameter.is_meta == theirs[name].is_meta, name
    del mine, theirs, parameter
    if conversion not in ("meta", "empty"):
        check_same(net, plain)


def test_loading_by_swapping(net: Net) -> None:
    plain = make_net()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for one in (net, plain):
            one.load_state_dict(make_net(1).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check_same(net, plain)


def without_scale(module: Net, state: dict, prefix: str, metadata: dict) -> None:
    del state["scale"]


def test_names_prefixes_and_hooks(net: Net) -> None:
    plain = make_net()
    for one in (net, plain):
        one.register_state_dict_post_hook(without_scale)
        one.register_state_dict_pre_hook(lambda module, prefix, keep: setattr(module, "seen", 1))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert net.seen == 1
    for options in ({"recurse": False}, {"remove_duplicate": False}, {"prefix": "x"}):
        names = [[name for name, _ in one.named_parameters(**options)] for one in (net, plain)]
        assert names[0] == names[1]
        names = [[name for name, _ in one.named_buffers(**options)] for one in (net, plain)]
        assert names[0] == names[1]
    kept = net.state_dict(keep_vars=True)
    assert kept["up.weight"] is net.up.weight
    assert not net.state_dict()["up.weight"].requires_grad
    assert [name for name, _ in net.named_children()] == [n for n, _ in plain.named_children()]


def test_a_shallow_copy_shares_its_tensors(net: Net) -> None:
    twin = copy.copy(net.up)
    with torch.no_grad():
        twin.weight.zero_()
    assert not net.up.weight.any()
    twin.bias = None
    assert net.up.bias is None  # as on a plain module, whose dictionaries are shared as well


@pytest.mark.parametrize("how", ["pickle", "torch.save", "a submodule"])
def test_a_pickled_module_is_a_plain_one(net: Net, how: str) -> None:
    plain = make_net()
    with torch.no_grad():
        net.up.weight.mul_(2)
        plain.up.weight.mul_(2)
    net.note = plain.note = "kept"
    if how == "pickle":
        made = pickle.loads(pickle.dumps(net))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(net, file)
        assert len(file.getvalue()) < 100_000  # each tensor alone, no whole shard
        file.seek(0)
        made = torch.load(file, weights_only=False)
    else:
        net, plain = net.up, plain.up
        made = pickle.loads(pickle.dumps(net))
    assert is_plain(made)
    check_same(made, plain)
    if how != "a submodule":
        assert made.note == "kept"
        assert made.head.weight is made.embed.weight
        assert torch.equal(made(IDS), plain(IDS))
    diskoffload.offload_module(made, "cpu", "cpu")
    check_same(net, plain)  # the original is as it was


def test_a_forward_of_the_modules_own_is_pickled(tmp_path: Path) -> None:
    net = make_net()
    net.up.forward = net.down.forward
    hold(net, "cpu", tmp_path)
    made = pickle.loads(pickle.dumps(net))
    assert made.up.forward.__self__ is made.down
    assert is_plain(made.down)


def names_of(net: Net) -> tuple[str, ...]:
    return (*dict(net.named_parameters()), *dict(net.named_buffers()))


class Rows(torch.utils.data.Dataset):
    """Reads a module's weight in a worker process."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.net.up.weight.detach()[row].clone()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_loaders_worker_reads_the_model(net: Net, start: str, way: str) -> None:
    if start == "spawn" and way not in ("disk-written", "zstd-written", "opened"):
        pytest.skip("a fresh process takes seconds: three ways will do")
    left_memory(net)
    loader = torch.utils.data.DataLoader(
        Rows(net), batch_size=2, num_workers=1, multiprocessing_context=start
    )
    assert torch.equal(torch.cat(list(loader)), make_net().up.weight[:4])
    del loader
    # What went to a spawned worker lies in memory that both share, as a plain module's does.
    check_same(net, make_net(), in_use=names_of(net) if start == "spawn" else ())


def test_shared_memory_is_shared_with_a_child(net: Net) -> None:
    plain = make_net()
    net.share_memory()
    left_memory(net)
    assert all(parameter.is_shared() for parameter in net.parameters())
    pid = os.fork()
    if pid == 0:
        try:
            with torch.no_grad():
                net.up.weight.mul_(2)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with torch.no_grad():
        plain.up.weight.mul_(2)
    check_same(net, plain, in_use=names_of(net))


def test_replication_over_devices_is_refused(net: Net, way: str) -> None:
    if way == "plain":
        pytest.skip("a plain module can be replicated")
    with pytest.raises(diskoffload.UnsupportedError, match=r"DataParallel.*dispatch_model"):
        net._replicate_for_data_parallel()
    check_same(net, make_net())


def test_hooks_from_before_offloading_still_run(way: str, tmp_path: Path) -> None:
    if way.startswith("opened"):
        pytest.skip("such a model is offloaded from the start")
    calls = []
    net = make_net()
    net.up.register_forward_pre_hook(lambda *args: calls.append("pre"))
    net.up.register_forward_hook(lambda *args: calls.append("post"))
    net.up.register_full_backward_hook(lambda *args: calls.append("back"))
    net = hold(net, way, tmp_path)
    net(IDS).sum().backward()
    assert calls == ["pre", "post", "back"]
    copy.deepcopy(net)(IDS)
    assert calls == ["pre", "post", "back", "pre", "post"]


def test_removing_gives_back_exactly_a_plain_module(net: Net) -> None:
    diskoffload.remove_dispatch(net)
    net.__dict__.pop("_offload_binding", None)  # of an opened one: for saving it as it was stored
    assert is_plain(net)
    check_same(net, make_net())
