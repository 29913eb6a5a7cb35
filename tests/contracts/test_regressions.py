"""Faults that were found once and must not come back."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diskoffload
from diskoffload.residency.held import State, held_of
from diskoffload.residency.resident import Residency
from diskoffload.store.folder import Folder
from diskoffload.system.files import Files
from diskoffload.system.memory import anonymous_bytes_of_process


def disk_linear(folder: Path, size: int = 64, **options: Any) -> torch.nn.Linear:
    module = torch.nn.Linear(size, size)
    options.setdefault("residency", Residency())
    return diskoffload.offload_module(module, "cpu", "disk", offload_dir=folder, **options)


def saved(module: torch.nn.Module, out: Path) -> dict[str, torch.Tensor]:
    diskoffload.save_checkpoint(module, out)
    return load_file(out / "model.safetensors")


@torch.no_grad()
def test_an_update_with_an_equal_value_does_not_hide_later_edits(tmp_path: Path) -> None:
    module = disk_linear(tmp_path / "off", compression="zstd")
    module.weight.data.zero_()
    module._parameters.sync()
    diskoffload.update_offload_parameter(module, "weight", torch.zeros(64, 64))
    module.weight.fill_(3)
    assert (saved(module, tmp_path / "out")["weight"] == 3).all()


@pytest.mark.parametrize("device", ["cpu", "disk"])
@torch.no_grad()
def test_a_square_weight_transposed_in_place_is_a_change(tmp_path: Path, device: str) -> None:
    options = {"offload_dir": tmp_path / "off"} if device == "disk" else {}
    module = diskoffload.offload_module(torch.nn.Linear(64, 64), "cpu", device, **options)
    before = module.weight.detach().clone()
    if device == "disk":
        module._parameters.sync()
    module.weight.data = module.weight.data.t()
    assert torch.equal(saved(module, tmp_path / "out")["weight"], before.t())
    assert torch.equal(copy.deepcopy(module).weight, before.t())


@torch.no_grad()
def test_the_stand_in_follows_the_object(tmp_path: Path) -> None:
    module = disk_linear(tmp_path / "off")
    stand_in = module._parameters.offloaded_values["weight"]
    module.requires_grad_(False)
    assert not module._parameters.offloaded_values["weight"].requires_grad
    assert module._parameters.offloaded_values["weight"] is stand_in
    assert not copy.deepcopy(module).weight.requires_grad
    module.half()
    assert module._parameters.offloaded_values["weight"].dtype == torch.float16


def test_a_first_read_in_inference_mode_does_not_forbid_training(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(8, 8), "bias": torch.zeros(8)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        bare = torch.nn.Linear(8, 8)
    module = diskoffload.open_checkpoint(
        tmp_path / "m.safetensors", model=bare, offload_dir=tmp_path / "off"
    )
    with torch.inference_mode():
        module(torch.ones(2, 8))
    module(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert module.weight.grad is not None
    diskoffload.update_offload_parameter(module, "weight", torch.zeros(8, 8))
    assert not module.weight.any()


class _Failing(Files):
    failing = False

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        if self.failing:
            raise diskoffload.NoSpaceError(28, "no space, for a test")
        super().write(fd, data, offset, path)


@torch.no_grad()
def test_sync_writes_what_an_earlier_failure_left(tmp_path: Path) -> None:
    files = _Failing()
    module = disk_linear(Folder(tmp_path / "off", files=files, group_bytes=1))  # type: ignore[arg-type]
    module._parameters.sync()
    files.failing = True
    for value in (1.0, 2.0):
        try:  # the error surfaces at whichever comes next
            diskoffload.update_offload_parameter(module, "weight", torch.full((64, 64), value))
            module._parameters.sync()
        except diskoffload.NoSpaceError:
            continue
        raise AssertionError("nothing failed")
    files.failing = False
    module._parameters.sync()
    assert (module.weight == 2).all()
    held = held_of(module.weight)
    assert held is not None
    assert held.state is State.BENEATH
    del held
    assert (saved(module, tmp_path / "out")["weight"] == 2).all()


@torch.no_grad()
def test_moving_to_another_folder_loses_no_pending_write(tmp_path: Path) -> None:
    module = disk_linear(tmp_path / "a")
    value = module.weight.detach().clone()
    diskoffload.dispatch_with_map(module, {"": ("cpu", "disk")}, tmp_path / "b", False)
    gc.collect()
    module._parameters.sync()
    module._parameters.sync()
    held = held_of(module.weight)
    assert held is not None
    assert held.state is State.BENEATH
    assert torch.equal(module.weight, value)


@torch.no_grad()
def test_closing_one_models_folder_leaves_another_models_sync_alone(tmp_path: Path) -> None:
    residency = Residency()
    one = disk_linear(tmp_path / "a", residency=residency)
    other = disk_linear(tmp_path / "b", residency=residency)
    for module in (one, other):
        module._parameters.sync()
    one._parameters.folder.close()
    one.weight.fill_(1)
    other.weight.fill_(2)
    other._parameters.sync()
    with pytest.raises(diskoffload.ClosedError, match="was closed"):
        one._parameters.sync()
    assert (one.weight == 1).all()
    assert (other.weight == 2).all()


def test_a_tie_keeps_nothing_of_a_dead_module(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    second.weight = first.weight
    for module in (first, second):
        diskoffload.offload_module(module, "cpu", "disk", offload_dir=tmp_path / "off")
    bias = weakref.ref(second.bias)
    del second, module
    gc.collect()
    assert bias() is None
    assert first.weight.shape == (8, 8)


@pytest.mark.parametrize("how", ["in place", "update", "assign"])
@torch.no_grad()
def test_changing_every_weight_keeps_no_memory(tmp_path: Path, how: str) -> None:
    count, size = 12, 2048  # 12 weights of 16 MiB
    weights = {f"{n}.weight": torch.full((size, size), float(n)) for n in range(count)}
    save_file(weights, tmp_path / "m.safetensors")
    del weights
    with torch.device("meta"):
        layers = [torch.nn.Linear(size, size, bias=False) for _ in range(count)]
    model = diskoffload.open_checkpoint(
        tmp_path / "m.safetensors",
        model=torch.nn.Sequential(*layers),
        offload_dir=Folder(tmp_path / "off", group_bytes=16 << 20),
    )
    before = anonymous_bytes_of_process()
    if before is None:
        pytest.skip("this system does not tell a process's anonymous memory")
    for layer in model:
        if how == "in place":
            layer.weight.add_(1)
            layer._parameters.sync()
        elif how == "update":
            diskoffload.update_offload_parameter(layer, "weight", layer.weight + 1)
        else:
            layer.weight = torch.nn.Parameter(layer.weight + 1)
        after = anonymous_bytes_of_process()
        assert after is not None
        # Two groups on their way, the layer at work, and what the allocator has not given back.
        assert after - before < 112 << 20
    for number, layer in enumerate(model):
        assert (layer.weight == number + 1).all()


def test_a_checkpoints_own_folder_is_no_offload_dir(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        bare = torch.nn.Linear(8, 8, bias=False)
    with pytest.raises(diskoffload.InvalidInputError, match="own folder"):
        diskoffload.open_checkpoint(tmp_path, model=bare, offload_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(diskoffload.InvalidInputError, match="meta device"):
        diskoffload.open_checkpoint(tmp_path, model=torch.nn.Linear(8, 8))


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for value in (1.0, 2.0):
        module = torch.nn.Linear(8, 8)
        torch.nn.init.constant_(module.weight, value)
        diskoffload.save_checkpoint(module, tmp_path / "link", overwrite=True)
        assert (load_file(tmp_path / "real" / "model.safetensors")["weight"] == value).all()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@torch.no_grad()
def test_many_shards_of_ours_hold_no_descriptors(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    modules = [disk_linear(tmp_path / "off", 8) for _ in range(40)]
    for number, module in enumerate(modules):
        module.weight.fill_(number)
        module._parameters.sync()
    assert len(list((tmp_path / "off").glob("*.safetensors"))) >= 40
    assert len(os.listdir("/proc/self/fd")) - before < 5
    for number, module in enumerate(modules):
        assert (module.weight == number).all()
        assert (copy.deepcopy(module).weight == number).all()
    assert (saved(modules[7], tmp_path / "out")["weight"] == 7).all()
