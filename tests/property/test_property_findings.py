"""What the machine found, each at its smallest."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diskoffload
from diskoffload.residency.held import State
from diskoffload.residency.resident import Residency, current_value


def offloaded(folder: Path, onload_device: str = "cpu", **options: Any) -> torch.nn.Linear:
    """Make a module whose value is on disk, and not in memory unless it is mapped."""
    options = {"residency": Residency(), "offload_dir": folder / "off", **options}
    module = torch.nn.Linear(40, 40)
    torch.nn.init.ones_(module.weight)  # pays to be compressed
    module.register_buffer("table", torch.arange(40.0))
    diskoffload.offload_module(module, onload_device, "disk", **options)
    leave(module)
    return module


def leave(module: Any) -> None:
    """Have every value on disk, and what may leave memory leave it."""
    for _ in range(2):  # what was written leaves at the second look
        module._parameters.sync()
        module._parameters.residency.make_room(1 << 60)


def test_a_replaced_entry_goes_with_its_model(tmp_path: Path) -> None:
    module = offloaded(tmp_path, residency=None)  # the books of the process, which stay
    weight = module.weight
    module.weight = torch.nn.Parameter(weight.detach() + 1)
    del module, weight
    gc.collect()
    assert not list(tmp_path.rglob("diskoffload*"))


@pytest.mark.parametrize("layout", ["gaps", "overlap"])
def test_strides_set_through_data_stay(layout: str, tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    value = torch.ones(40, 80)[:, ::2] if layout == "gaps" else torch.ones(40, 1).expand(40, 40)
    module.weight.data = value
    strides = value.stride()
    del value
    leave(module)
    assert module.weight.stride() == strides


def test_columns_of_a_matrix_leave_memory(tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    module.weight = torch.nn.Parameter(torch.ones(40, 80)[:, :40])
    leave(module)
    (held,) = [one for one in module._parameters.residency.entries() if one.name == "weight"]
    assert held.state is not State.AS_IS


def test_what_replaced_a_waiting_value_is_on_disk_after_sync(tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    diskoffload.update_offload_parameter(module, "weight", torch.zeros(40, 40))
    module.weight.data = torch.full((40, 40), 2.0)  # while the zeros wait for the writer
    module._parameters.sync()
    written = [load_file(path) for path in (tmp_path / "off").glob("*.safetensors")]
    values = [value for one in written for value in one.values() if value.shape == (40, 40)]
    assert any(bool((value == 2).all()) for value in values)


def test_what_is_assigned_is_brought_to_the_onload_device_when_it_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(40, 40)
    # Another spelling stands for another device, as far as a device is all that is asked.
    diskoffload.offload_module(module, "cpu:0", "disk", offload_dir=tmp_path / "off")
    (held,) = [one for key, one in module._parameters.held_items() if key == "weight"]
    assert held.place is None
    assert module.weight is held.tensor
    assert held.place == torch.device("cpu:0")
    module._parameters.onload_device = "cpu"
    assert module.weight is held.tensor


@torch.no_grad()
def test_a_view_kept_from_a_module_that_onloads_to_cpu_0(tmp_path: Path) -> None:
    module = offloaded(tmp_path, "cpu:0")
    view = module.weight.data
    diskoffload.update_offload_parameter(module, "weight", torch.zeros(40, 40))
    assert not module.weight.any()
    assert not view.any()


@pytest.mark.parametrize("edited", ["before", "after"])
@torch.no_grad()
def test_a_view_that_torch_calls_ambiguous_is_held_as_it_is(edited: str, tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    view = module.weight.view(-1)  # of a leaf, made without grad mode
    if edited == "before":
        module.weight.zero_()
    module.register_buffer("flat", view)
    if edited == "after":
        module.weight.zero_()
    leave(module)
    assert not module.flat.detach().any()


def test_a_deep_copy_keeps_a_tie_with_a_plain_module(tmp_path: Path) -> None:
    plain = torch.nn.Linear(40, 40)
    disk = offloaded(tmp_path)
    disk.weight = plain.weight
    leave(disk)
    twin = copy.deepcopy(torch.nn.Sequential(plain, disk))
    assert twin[1].weight is twin[0].weight


@torch.no_grad()
def test_reading_after_an_edit_and_a_close(tmp_path: Path) -> None:
    module = offloaded(tmp_path, compression="zstd")
    module._parameters.folder.close()
    module.weight.zero_()
    assert module.table[1] == 1
    assert not module.weight.any()


@pytest.mark.parametrize("part", [slice(0, 20), slice(20, 40)], ids=["overlap", "apart"])
@torch.no_grad()
def test_a_tie_is_found_when_the_first_entry_of_its_memory_is_gone(
    part: slice, tmp_path: Path
) -> None:
    module = offloaded(tmp_path)
    fused = torch.arange(40.0)
    module.register_buffer("first", fused[:20])
    module.register_buffer("second", fused[part])
    del fused, module.first
    module.register_buffer("tied", module.second[:5])
    module._parameters.folder.flush()
    twin = copy.deepcopy(module)
    twin.tied.fill_(7)
    assert (twin.second[:5] == 7).all()


def test_what_stands_for_a_value_with_gaps_can_be_put_back(tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    module.table.data = torch.arange(80.0)[::2]
    with diskoffload.disable_onloading():
        assert module.table is module.table
        module.table = module.table
    assert module.table[1] == 2


def test_what_stands_for_a_value_can_be_put_back_after_that_took_another_shape(
    tmp_path: Path,
) -> None:
    module = offloaded(tmp_path)
    with diskoffload.disable_onloading():
        standin = module.weight
    module.weight.data = torch.ones(3, 2, dtype=torch.float64)
    with diskoffload.disable_onloading():
        assert module.weight is standin
    assert (standin.shape, standin.dtype) == ((3, 2), torch.float64)
    module.weight = standin
    assert module.weight.sum() == 6


@pytest.mark.parametrize("name", ["weight", "table"])
def test_a_deep_copy_has_the_strides_of_a_plain_one(name: str, tmp_path: Path) -> None:
    module, plain = offloaded(tmp_path), torch.nn.Linear(40, 40)
    plain.register_buffer("table", torch.arange(40.0))
    for one in (module, plain):
        getattr(one, name).data = torch.ones(40, 80).T[::2]  # torch closes a Parameter's gaps
    leave(module)
    twin, expected = (getattr(copy.deepcopy(one), name) for one in (module, plain))
    assert twin.stride() == expected.stride()
    assert torch.equal(twin, expected)


@torch.no_grad()
def test_what_is_found_at_a_sync_to_share_an_edited_entrys_memory(tmp_path: Path) -> None:
    for number in range(8):  # entries are looked at in any order
        module = offloaded(tmp_path / str(number))
        module.weight.fill_(7)
        module.table.data = module.weight.data[1]
        module._parameters.sync()
        for held in {one.root for one in module._parameters.residency.known()}:
            backing, changed = current_value(held)
            assert changed is None
            assert backing is not None


@torch.no_grad()
def test_what_is_put_back_is_a_tie_with_what_took_its_memory_meanwhile(tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    weight, module.weight = module.weight, None
    module.register_buffer("row", weight.data[1])
    module.weight = weight
    del weight
    module._parameters.folder.flush()
    twin = copy.deepcopy(module)
    twin.row.zero_()
    assert not twin.weight[1].any()


def test_an_entry_whose_object_is_gone_lies_on_nothing(tmp_path: Path) -> None:
    module = offloaded(tmp_path)
    with diskoffload.disable_offloading():
        module.register_buffer("row", module.weight.data[1])
        row, module.row = module.row, None  # its entry is kept until the end of the context
        del row
        module.row = module.weight.data[1]
