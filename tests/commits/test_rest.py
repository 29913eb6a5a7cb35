"""What nobody had since a commit is not looked at by the next; whatever was done to it is seen."""

from __future__ import annotations

import copy
import errno
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commit_cases import Make, bare, check_values, shards_in, values
from safetensors.torch import save_file

import diskoffload
from diskoffload.committing.parting import Parting
from diskoffload.committing.resting import rest_of
from diskoffload.committing.shown import Shown, faces_of, folder_of
from diskoffload.errors import StorageError
from diskoffload.residency.held import Held, State
from diskoffload.system.files import Files


def settle(net: torch.nn.Module) -> None:
    """Commit until all that can rest does; of what was written only the next commit knows."""
    diskoffload.commit(net)
    gc.collect()
    diskoffload.commit(net)


def resting(net: torch.nn.Module) -> set[str]:
    faces = faces_of(net)
    notes = folder_of(net, faces).resting
    rests = [(face, rest_of(face, notes)) for face in faces]
    seen = [one for face, rest in rests if rest is not None for one in face.shown()]
    return {one.name for one in seen if one.value is not None}


def edit(net: Any) -> None:
    with torch.no_grad():
        net.down.weight.mul_(2)


def edit_data(net: Any) -> None:
    net.down.weight.data[0] = 5


def edit_numpy(net: Any) -> None:
    net.down.weight.detach().numpy()[1] = 9


def edit_after_a_while(net: Any) -> None:
    view = net.down.weight.detach().view(-1)
    diskoffload.commit(net)
    view[3] = 11


def edit_through_a_weak_reference(net: Any) -> None:
    known = weakref.ref(net.down.weight)
    settle(net)
    weight = known()
    assert weight is not None
    weight.data.add_(1)


def edit_what_was_evicted(net: Any) -> None:
    edit(net)
    net.up._parameters.residency.make_room(1 << 40)


def assign(net: Any) -> None:
    net.down.weight = torch.nn.Parameter(torch.randn(16, 64))


def take_the_value_of(net: Any) -> None:
    diskoffload.update_offload_parameter(net.down, "weight", torch.ones(16, 64))


def put_data(net: Any) -> None:
    net.down.weight.data = torch.ones(2, 3)


def make_it_frozen(net: Any) -> None:
    net.down.weight.requires_grad_(False)


def make_what_stands_for_it_frozen(net: Any) -> None:
    with diskoffload.disable_onloading():
        net.down.weight.requires_grad_(False)


def swap(net: Any) -> None:
    net.up.bias, net.norm.bias = net.norm.bias, net.up.bias


def swap_within(net: Any) -> None:
    net.norm.bias, net.norm.weight = net.norm.weight, net.norm.bias


def delete(net: Any) -> None:
    del net.down.weight


def forget(net: Any) -> None:
    net.up.bias = None


def have_it_unsaved(net: Any) -> None:
    net.norm._non_persistent_buffers_set.add("running_mean")


def add(net: Any) -> None:
    net.down.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    net.down.register_buffer("count", torch.ones(3))


def add_none(net: Any) -> None:
    net.down.register_parameter("extra", None)


def tie(net: Any) -> None:
    net.norm.register_parameter("tied", net.down.weight)


def tie_plainly(net: Any) -> None:
    plain = torch.nn.Module()
    plain.weight = net.down.weight
    net.plain = plain


def train(net: Any) -> None:
    net.down(net.norm(net.up.weight.t()[:, :64]).clone()).sum().backward()
    torch.optim.SGD([net.down.weight, net.norm.weight], lr=1.0).step()


CHANGES = [
    edit,
    edit_data,
    edit_numpy,
    edit_after_a_while,
    edit_through_a_weak_reference,
    edit_what_was_evicted,
    assign,
    take_the_value_of,
    put_data,
    make_it_frozen,
    make_what_stands_for_it_frozen,
    swap,
    swap_within,
    delete,
    forget,
    have_it_unsaved,
    add,
    add_none,
    tie,
    tie_plainly,
    train,
]


def check_reopened(net: torch.nn.Module, folder: Path) -> None:
    """Compare what a second model of the folder has with what this one does."""
    expected = values(net)
    kinds = {
        name: (type(one) is torch.nn.Parameter, one.requires_grad)
        for name, one in [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    }
    saved = set(net.state_dict())
    plain = diskoffload.last_commit(folder)
    assert plain.number
    again = _reopened(net, folder)
    check_values(again, expected)
    assert set(again.state_dict()) == saved
    for name, one in [*again.named_parameters(remove_duplicate=False), *again.named_buffers()]:
        assert (type(one) is torch.nn.Parameter, one.requires_grad) == kinds[name], name


def _reopened(net: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Build what the net has become, without values, and bind it to the commit."""
    made: Any = bare()
    made.table = torch.arange(16.0)
    if hasattr(net, "plain"):
        made.plain = torch.nn.Module()
    return diskoffload.reopen(folder, model=made, read_only=True)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_what_rested_is_committed(
    change: Callable[[Any], None], make: Make, tmp_path: Path
) -> None:
    net = make()
    settle(net)
    assert {"down.weight", "up.bias", "norm.weight"} <= resting(net)
    change(net)
    diskoffload.commit(net)
    check_reopened(net, tmp_path / "off")
    settle(net)
    check_reopened(net, tmp_path / "off")


@pytest.mark.parametrize("change", [edit, assign, swap, make_it_frozen])
def test_what_a_failed_commit_saw_is_seen_again(
    change: Callable[[Any], None], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make()
    settle(net)
    change(net)

    def refuse(self: Files, *args: object) -> None:
        raise StorageError(errno.EIO, "no")

    for name in ("append", "write_at", "sync_folder"):
        with monkeypatch.context() as context:
            if hasattr(Files, name):
                context.setattr(Files, name, refuse)
                with pytest.raises(StorageError):
                    diskoffload.commit(net)
    diskoffload.commit(net)
    check_reopened(net, tmp_path / "off")


def test_a_lost_file_is_written_anew_however_long_it_rested(tmp_path: Path) -> None:
    net: Any = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    expected = values(net)
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    settle(net)
    assert len(resting(net)) == 8
    for shard in shards_in(tmp_path / "off"):
        shard.unlink()
    with pytest.raises(diskoffload.DamagedFileError):
        diskoffload.commit(net)
    diskoffload.commit(net)
    check_values(net, expected)
    del net
    gc.collect()
    again = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    check_values(diskoffload.reopen(tmp_path / "off", model=again), expected)


def test_a_file_that_is_mostly_dead_is_left_by_what_rests(tmp_path: Path) -> None:
    net: Any = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    settle(net)
    (first,) = shards_in(tmp_path / "off")
    for layer in net[:5]:
        layer.weight = torch.nn.Parameter(torch.randn(64, 64))
    settle(net)
    settle(net)
    assert first not in shards_in(tmp_path / "off")
    expected = values(net)
    del net, layer
    gc.collect()
    again = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    check_values(diskoffload.reopen(tmp_path / "off", model=again), expected)


def many(count: int, offload_dir: Path, device: str = "disk") -> Any:
    net: Any = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(count)))
    diskoffload.offload_module(net[0], "cpu", "disk", offload_dir=offload_dir, name="0")
    for number, layer in enumerate(net[1:], 1):
        where = {"offload_dir": offload_dir} if device == "disk" else {}
        diskoffload.offload_module(layer, "cpu", device, name=str(number), **where)
    return net


@pytest.mark.parametrize("device", ["disk", "cpu"])
def test_a_commit_looks_at_what_was_in_use(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = many(200, tmp_path / "off", device)
    settle(net)
    looked_at: list[str] = []
    made = Shown.__init__

    def count(self: Shown, name: str, is_parameter: bool, persistent: bool, value: Any) -> None:
        if value is not None:
            looked_at.append(name)
        made(self, name, is_parameter, persistent, value)

    monkeypatch.setattr(Shown, "__init__", count)
    net[7].weight = torch.nn.Parameter(torch.randn(8, 8))
    with torch.no_grad():
        net[9].weight.add_(1)
        assert net[11].weight.sum() != 0
    diskoffload.commit(net)
    # Those that rest are named once more when they are laid to rest.
    assert set(looked_at) == {"7.weight", "9.weight", "11.weight"}
    diskoffload.commit(net)
    looked_at.clear()
    diskoffload.commit(net)
    assert looked_at == []


def test_a_checkpoint_of_which_some_was_read(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    save_file({f"{n}.weight": torch.randn(8, 8) for n in range(9)}, source / "model.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(9)))
    net: Any = diskoffload.open_checkpoint(source, model=empty, offload_dir=tmp_path / "off")
    diskoffload.commit(net)
    assert len(resting(net)) == 9
    held = net[3].weight
    assert net[4].weight.sum() != 0
    assert resting(net) == {f"{n}.weight" for n in (0, 1, 2, 5, 6, 7, 8)}
    diskoffload.commit(net)
    assert resting(net) == {f"{n}.weight" for n in range(9)} - {"3.weight"}
    del held


def test_what_is_streamed_rests_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    state = {f"{n}.weight": torch.randn(256, 256) for n in range(9)}
    save_file(state, source / "model.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(9)))
    net: Any = diskoffload.open_checkpoint(
        source, model=empty, offload_dir=tmp_path / "off", mode="streamed"
    )
    for layer in net:
        assert layer.weight.sum() != 0
    loaded = [one for layer in net for _, one in layer._parameters.held_items()]
    assert [held.state for held in loaded if held] == [State.LOADED] * 9
    diskoffload.commit(net)
    assert len(resting(net)) == 9
    compared: list[str] = []
    asked = Held.is_changed

    def note(self: Held) -> bool:
        compared.append(self.name)
        return asked(self)

    monkeypatch.setattr(Held, "is_changed", note)
    diskoffload.commit(net)
    assert compared == []
    with torch.no_grad():
        net[2].weight.add_(1)
    diskoffload.commit(net)
    assert compared
    expected = values(net)
    with torch.device("meta"):
        empty = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(9)))
    again = diskoffload.reopen(tmp_path / "off", model=empty, read_only=True)
    check_values(again, expected)


def test_a_module_that_goes_by_another_name(tmp_path: Path) -> None:
    net: Any = torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    settle(net)
    net["three"] = net.pop("two")
    names = {f"{module}.{name}" for module in ("one", "three") for name in ("weight", "bias")}
    for _ in range(2):
        assert {name for name, one in diskoffload.commit(net).entries.items() if one["at"]} == names


def test_it_is_told_of_its_own_folder_only(tmp_path: Path) -> None:
    """What rests in one folder has to be written to another that takes its place."""
    net: Any = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    expected = values(net)
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    diskoffload.commit(net)
    del net
    gc.collect()
    # Nothing of it was ever read, so that it is at rest at once.
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    diskoffload.reopen(tmp_path / "off", model=net)
    diskoffload.commit(net)
    assert len(resting(net)) == 4
    to_disk = {"0": ("cpu", "disk"), "1": ("cpu", "disk")}
    diskoffload.dispatch_with_map(net, to_disk, offload_dir=tmp_path / "other")
    diskoffload.commit(net)
    assert shards_in(tmp_path / "other")
    del net
    gc.collect()
    again = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    check_values(diskoffload.reopen(tmp_path / "other", model=again), expected)


def test_what_a_sync_moved_is_seen(tmp_path: Path) -> None:
    net: Any = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    diskoffload.commit(net)
    del net
    gc.collect()
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    diskoffload.reopen(tmp_path / "off", model=net)
    diskoffload.commit(net)
    assert len(resting(net)) == 8
    (first,) = shards_in(tmp_path / "off")
    for layer in net[:5]:
        layer.weight = torch.nn.Parameter(torch.randn(64, 64))
    net[0]._parameters.sync()  # as half of the file is dead now, what is alive moves
    diskoffload.commit(net)
    assert first not in shards_in(tmp_path / "off")


def test_what_rests_in_memory_is_not_written_again(tmp_path: Path) -> None:
    net = many(5, tmp_path / "off", "cpu")
    settle(net)
    settle(net)
    assert len(resting(net)) == 5
    before = shards_in(tmp_path / "off")
    assert net[3].weight.sum() != 0
    diskoffload.commit(net)
    assert shards_in(tmp_path / "off") == before


def edit_before_hiding(net: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the weight edited by somebody who lets go of it before the next commit hides it."""
    in_use = [net.weight]
    hide = Parting.hide

    def edited_before(self: Parting) -> Any:
        while in_use:
            in_use.pop().data.add_(1)
        return hide(self)

    monkeypatch.setattr(Parting, "hide", edited_before)


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_an_edit_in_the_moment_before_it_is_hidden(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    save_file({"weight": torch.randn(256, 256)}, source / "model.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Linear(256, 256, bias=False)
    net = diskoffload.open_checkpoint(source, model=empty, offload_dir=tmp_path / "off", mode=mode)
    edit_before_hiding(net, monkeypatch)
    for _ in range(2):
        diskoffload.commit(net)
        with torch.device("meta"):
            empty = torch.nn.Linear(256, 256, bias=False)
        again = diskoffload.reopen(tmp_path / "off", model=empty, read_only=True)
        expected = values(net)
        check_values(again, expected)


@pytest.mark.parametrize("device", ["disk", "cpu"])
def test_a_module_that_was_taken_out_for_a_while(device: str, tmp_path: Path) -> None:
    """What an older commit said of it is no more in the last one, nor are its files."""
    net: Any = torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})
    for name, where in (("one", "disk"), ("two", device)):
        options = {"offload_dir": tmp_path / "off"} if where == "disk" else {}
        diskoffload.offload_module(net[name], "cpu", where, name=name, **options)
    settle(net)
    for name in ("weight", "bias"):  # so that they are in a file of their own
        shape = getattr(net["two"], name).shape
        setattr(net["two"], name, torch.nn.Parameter(torch.rand(shape)))
    settle(net)
    settle(net)
    assert resting(net) == {f"{m}.{name}" for m in ("one", "two") for name in ("weight", "bias")}
    expected = values(net)
    settle(net)
    settle(net)
    two = net.pop("two")
    settle(net)
    net["two"] = two
    diskoffload.commit(net)
    again = torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})
    check_values(diskoffload.reopen(tmp_path / "off", model=again, read_only=True), expected)


def test_a_module_in_memory_that_two_models_have(tmp_path: Path) -> None:
    shared = torch.nn.Linear(8, 8)
    diskoffload.offload_module(shared, "cpu", "cpu", name="shared")
    nets: list[Any] = []
    for name in ("one", "two"):
        own = torch.nn.Linear(8, 8)
        diskoffload.offload_module(own, "cpu", "disk", offload_dir=tmp_path / name, name="own")
        nets.append(torch.nn.ModuleDict({"own": own, "shared": shared}))
    for net in (*nets, *nets):
        settle(net)
    for name, net in zip(("one", "two"), nets, strict=True):
        again = torch.nn.ModuleDict({"own": torch.nn.Linear(8, 8), "shared": torch.nn.Linear(8, 8)})
        again = diskoffload.reopen(tmp_path / name, model=again, read_only=True)
        check_values(again, values(net))


def test_what_rests_in_memory_when_the_folder_changes(tmp_path: Path) -> None:
    net = many(1, tmp_path / "off")
    net.append(torch.nn.Linear(8, 8))
    diskoffload.offload_module(net[1], "cpu", "cpu", name="1")
    settle(net)
    diskoffload.remove_module_offload(net[0], onload_tensors=True)
    diskoffload.offload_module(net[0], "cpu", "disk", offload_dir=tmp_path / "other", name="0")
    settle(net)
    again = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8))
    again = diskoffload.reopen(tmp_path / "other", model=again, read_only=True)
    check_values(again, values(net))


def test_two_modules_with_one_mapping_stay_tied(tmp_path: Path) -> None:
    net: Any = torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    settle(net)
    net["two"] = copy.copy(net["one"])
    assert net["two"].weight is net["one"].weight
    for _ in range(4):
        gc.collect()
        entries = diskoffload.commit(net).entries
        assert entries["two.weight"]["at"] == {"tie": "one.weight"}


@pytest.mark.parametrize("mode", ["mapped", "streamed"])
def test_an_edit_in_that_moment_of_what_is_in_a_file_of_ours(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is committed to another file, and the older one is none of the commit's any more."""
    net = torch.nn.Linear(256, 256, bias=False)
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off", mode=mode)
    settle(net)
    expected = net.weight.detach() + 1
    edit_before_hiding(net, monkeypatch)
    for _ in range(3):
        diskoffload.commit(net)
        again = torch.nn.Linear(256, 256, bias=False)
        again = diskoffload.reopen(tmp_path / "off", model=again, read_only=True)
        check_values(again, {"weight": expected})


@pytest.mark.parametrize("is_put_later", [False, True])
def test_what_lies_on_the_memory_of_an_array_is_looked_at(
    is_put_later: bool, tmp_path: Path
) -> None:
    """Who has the array needs no tensor to write to it."""
    net = many(2, tmp_path / "off", "cpu")
    array = np.zeros((8, 8), dtype=np.float32)
    if is_put_later:
        net[1].weight.data = torch.from_numpy(array)
    else:
        net[1].weight = torch.nn.Parameter(torch.from_numpy(array))
    settle(net)
    array[2] = 5
    assert resting(net) == {"0.weight"}
    diskoffload.commit(net)
    expected = values(net)
    assert expected["1.weight"][2, 0] == 5
    again = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(2)))
    check_values(diskoffload.reopen(tmp_path / "off", model=again, read_only=True), expected)


def test_what_stands_for_it_is_known_by_a_weak_reference(tmp_path: Path) -> None:
    net = torch.nn.Linear(8, 8)
    diskoffload.offload_model(net, "cpu", "disk", offload_dir=tmp_path / "off")
    diskoffload.commit(net)
    del net
    gc.collect()
    net = torch.nn.Linear(8, 8)
    diskoffload.reopen(tmp_path / "off", model=net)
    with diskoffload.disable_onloading():
        known = weakref.ref(net.weight)
    settle(net)
    standin = known()
    assert standin is not None
    standin.requires_grad_(False)
    del standin
    assert not diskoffload.commit(net).entries["weight"]["grad"]
