"""The names, arguments and meanings that users of compressed-tensors rely on."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ways import hold, make_net

import diskoffload
from diskoffload import CPUCache, DeviceCache, DiskCache, OffloadCache

SHARED = (
    "align_module_device",
    "align_modules",
    "disable_offloading",
    "disable_onloading",
    "dispatch_model",
    "dispatch_with_map",
    "get_cache_init_kwargs",
    "get_device_map",
    "get_execution_device",
    "get_offloaded_device",
    "offload_model",
    "offload_module",
    "register_offload_module",
    "remove_dispatch",
    "set_onload_device",
    "unwrap_offload_forward",
    "update_offload_parameter",
)


@pytest.mark.parametrize("name", SHARED)
def test_arguments_are_compressed_tensors_own_in_their_order(name: str) -> None:
    theirs = pytest.importorskip("compressed_tensors.offload")
    mine = list(inspect.signature(getattr(diskoffload, name)).parameters.values())
    positional = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = [
        p.name
        for p in inspect.signature(getattr(theirs, name)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert positional[: len(expected)] == expected


@pytest.mark.parametrize("cache", ["OffloadCache", "CPUCache", "DeviceCache", "DiskCache"])
def test_caches_have_compressed_tensors_public_names(cache: str) -> None:
    theirs = pytest.importorskip("compressed_tensors.offload.cache")
    public = {name for name in dir(getattr(theirs, cache)) if not name.startswith("_")}
    # Distribution, staging and its file bookkeeping are not part of this surface.
    public -= {"stage", "is_staged", "index", "create_checkpoint_symlink", "offload_dir"}
    made = getattr(diskoffload, cache)
    missing = {name for name in public if not hasattr(made, name)}
    assert missing <= {"onload_device", "offload_device"}  # annotations there, set in __init__


def test_every_exported_name_is_documented_and_sorted() -> None:
    assert sorted(diskoffload.__all__) == diskoffload.__all__
    for name in diskoffload.__all__:
        thing = getattr(diskoffload, name)
        assert thing.__doc__, name
        assert thing.__module__.startswith("diskoffload"), name


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("cpu", CPUCache),
        (torch.device("cpu"), CPUCache),
        ("disk", DiskCache),
        ("cuda:1", DeviceCache),
    ],
)
def test_cls_from_device(device: Any, found: type) -> None:
    assert OffloadCache.cls_from_device(device) is found


@pytest.mark.parametrize("device", ["meta", "tape"])
def test_cls_from_device_refuses(device: str) -> None:
    with pytest.raises(diskoffload.InvalidInputError, match=device):
        OffloadCache.cls_from_device(device)


def test_a_cache_by_itself(tmp_path: Path) -> None:
    """As compressed-tensors' own documentation uses one."""
    source = {"weight": torch.nn.Parameter(torch.ones(4, 4)), "bias": None}
    cache = DiskCache.from_mapping(source, "cpu", offload_dir=tmp_path / "off")
    assert cache.offload_dir == tmp_path / "off"
    assert list(cache) == ["weight", "bias"]
    assert cache["bias"] is None
    offloaded = cache.offloaded_values["weight"]
    assert offloaded.is_meta
    assert isinstance(offloaded, torch.nn.Parameter)
    assert cache.offloaded_values["bias"] is None
    assert torch.equal(cache.onload(offloaded), torch.ones(4, 4))
    cache.update_offload(offloaded, torch.zeros(4, 4))
    assert not cache["weight"].any()
    loose = cache.offload(torch.full((3,), 7.0))
    assert loose.is_meta
    assert cache.onload(loose).tolist() == [7.0, 7.0, 7.0]
    assert cache.onload(None) is None
    assert cache.offload(None) is None
    with pytest.raises(diskoffload.NotOffloadedError):
        cache.onload(torch.empty(3, device="meta"))
    with pytest.raises(KeyError):
        cache["nothing"]
    with pytest.raises(diskoffload.InvalidInputError, match="offloads to disk"):
        DiskCache("cpu", "cpu", offload_dir=tmp_path / "off")
    with pytest.raises(diskoffload.InvalidInputError, match="tensor or None"):
        cache["weight"] = 3
    assert len(cache) == 2


def test_cache_init_kwargs_make_another_like_it(tmp_path: Path) -> None:
    net = hold(make_net(), "zstd-written", tmp_path)
    kwargs = diskoffload.get_cache_init_kwargs(net.up)
    assert kwargs == {
        "onload_device": torch.device("cpu"),
        "offload_device": "disk",
        "offload_dir": tmp_path / "offload",
        "compression": "zstd",
    }
    other = diskoffload.offload_module(torch.nn.Linear(2, 2), **kwargs)
    assert other._parameters.folder is net.up._parameters.folder
    plain = diskoffload.get_cache_init_kwargs(torch.nn.Linear(2, 2), {"offload_dir": "x"})
    assert plain == {
        "offload_dir": "x",
        "onload_device": torch.device("cpu"),
        "offload_device": torch.device("cpu"),
    }


def test_set_onload_device_keeps_what_is_offloaded(tmp_path: Path) -> None:
    net = make_net()
    diskoffload.offload_module(net.up, "cpu", "disk", offload_dir=tmp_path / "off")
    diskoffload.set_onload_device(net, "cpu:0")
    device_map = diskoffload.get_device_map(net)
    assert device_map["up"] == (torch.device("cpu:0"), "disk")
    assert device_map["down"] == (torch.device("cpu:0"), torch.device("cpu"))


@torch.no_grad()
def test_dispatch_moves_a_model_there_and_back(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "diskoffload")
    net, plain = make_net(), make_net()
    ids = torch.arange(32)
    objects = dict(net.named_parameters())
    for budget in ("3KB", "1GB", "0B"):
        before = diskoffload.get_device_map(net)
        options: dict[str, Any] = {"max_memory": {"cpu": budget}, "offload_dir": tmp_path / "off"}
        plan = diskoffload.plan_model(net, **options)
        assert diskoffload.get_device_map(net) == before  # a plan does nothing
        diskoffload.dispatch_model(net, **options)
        now = diskoffload.get_device_map(net)
        for name, places in plan.device_map().items():
            assert tuple(map(str, now[name])) == places
        assert plan.reason in caplog.text
        assert torch.equal(net(ids), plain(ids))
        assert dict(net.named_parameters()).keys() == objects.keys()
        assert all(p is objects[name] for name, p in net.named_parameters())
    diskoffload.remove_dispatch(net)
    assert torch.equal(net(ids), plain(ids))


def test_dispatch_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    net = make_net()
    with pytest.raises(diskoffload.InvalidInputError, match="both device_memory and max_memory"):
        diskoffload.dispatch_model(net, {"cpu": 1 << 30}, max_memory={"cpu": "1GiB"})
    with pytest.raises(diskoffload.InvalidInputError, match="nothing to dispatch"):
        diskoffload.dispatch_model(torch.nn.ReLU())
    with pytest.raises(diskoffload.InvalidInputError, match="'up2'"):
        diskoffload.dispatch_with_map(net, {"up2": ("cpu", "cpu")})
    with pytest.raises(
        diskoffload.InvalidInputError, match="compression is for offloading to disk"
    ):
        diskoffload.offload_module(net.up, "cpu", "cpu", compression="zstd")
    with pytest.raises(diskoffload.InvalidInputError, match="cannot onload to 'nowhere'"):
        diskoffload.offload_module(net.up, "nowhere", "cpu")
    absent = "xpu:63"
    for attempt in (
        lambda: diskoffload.offload_module(net.up, absent, "cpu"),
        lambda: diskoffload.offload_model(net, absent),
        lambda: diskoffload.set_onload_device(net, absent),
        lambda: diskoffload.align_module_device(net.up, absent).__enter__(),
    ):
        with pytest.raises(diskoffload.InvalidInputError, match=f"'{absent}'.*name a device"):
            attempt()
    assert type(net.up._parameters) is dict


def test_no_split_modules_stay_together(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)])
    model._no_split_modules = ["Sequential"]
    plan = diskoffload.plan_model(model[0], max_memory={"cpu": "1MB"})
    assert [entry.name for entry in plan.entries] == ["0"]  # the model itself is no unit of it
    plan = diskoffload.plan_model(model[0], None, None, ["Sequential"], max_memory={"cpu": "1MB"})
    assert [entry.name for entry in plan.entries] == [""]


def test_inputs_move_through_nested_structures() -> None:
    from diskoffload.forward import send_tensors

    value = {"a": [torch.ones(1), (torch.ones(1), None)], "b": "text"}
    assert send_tensors(value, torch.device("meta"))["a"][1][0].is_meta
    assert value["a"][0].device.type == "cpu"
    tensor = torch.ones(1)
    assert send_tensors(tensor, torch.device("cpu")) is tensor


def test_offloaded_tensors_have_their_full_names_in_the_shards(tmp_path: Path) -> None:
    from safetensors import safe_open

    net = make_net()
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    net.up._parameters.sync()
    (file,) = (tmp_path / "off").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        names = {name for name in opened.keys() if not name.startswith("__filler__")}  # noqa: SIM118
        assert torch.equal(opened.get_tensor("up.weight"), net.up.weight)
    assert names == {*dict(net.named_parameters()), *dict(net.named_buffers())}
