"""What was committed is what reopening gives: all of it, and nothing that came after."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from commit_cases import Make, bare, check_values, names_in, seeded, shards_in, values

import diskoffload
from diskoffload.errors import (
    AlreadyOffloadedError,
    ClosedError,
    CommitError,
    FolderInUseError,
    InvalidInputError,
    NotOffloadedError,
)
from diskoffload.inspect import inspect_path
from diskoffload.residency.resident import Residency


def edit(net: Any) -> None:
    with torch.no_grad():
        net.up.weight.mul_(2)
        net.embed.weight[3] = 7
        net.norm.running_mean.add_(1)
    net.table.data.add_(1)


def replace(net: Any) -> None:
    net.up.weight = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.int8), requires_grad=False)
    net.down.weight = torch.nn.Parameter(torch.randn(16, 64).t())
    net.scale = None
    del net.up.bias
    net.up.register_buffer("weight_scale", torch.ones(3))
    net.up.register_parameter("extra", None)
    net.down.register_buffer("scratch", torch.ones(2, dtype=torch.bfloat16), persistent=False)


def untie(net: Any) -> None:
    net.head.weight = torch.nn.Parameter(net.head.weight.detach() + 1)


def tie(net: Any) -> None:
    net.up.register_parameter("tied", net.down.weight)
    net.up.register_buffer("rows", net.norm.running_var.detach()[8:24])


CHANGES = [edit, replace, untie, tie]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_committed_comes_back(
    change: Any, make: Make, bare_again: Make, tmp_path: Path
) -> None:
    net = make()
    first = diskoffload.commit(net, note={"done": ["nothing"]})
    assert first.number == 1
    change(net)
    expected = values(net)
    second = diskoffload.commit(net, note={"done": [change.__name__]})
    assert (second.number, second.note) == (2, {"done": [change.__name__]})
    with torch.no_grad():  # none of this was committed
        net.norm.weight.zero_()
        net.embed.weight.zero_()
    net.norm._parameters.sync()
    del net
    net = diskoffload.reopen(tmp_path / "off", model=bare_again(), verify="full")
    check_values(net, expected)
    assert diskoffload.last_commit(net) == second
    assert shards_in(tmp_path / "off") == [
        tmp_path / "off" / name for name in sorted(second.shards)
    ]
    # The same folder goes on from there.
    edit_again = [one for one in (edit,) if change is not replace]
    for one in edit_again:
        one(net)
    expected = values(net)
    assert diskoffload.commit(net).number == 3
    del net
    check_values(diskoffload.reopen(tmp_path / "off", model=bare_again()), expected)


def test_ties_and_the_kinds_of_tensors_come_back(
    make: Make, bare_again: Make, tmp_path: Path
) -> None:
    net: Any = make()
    replace(net)
    tie(net)
    net.norm.weight.requires_grad_(False)
    diskoffload.commit(net)
    state = net.state_dict()
    del net
    net = diskoffload.reopen(tmp_path / "off", model=bare_again())
    assert net.head.weight is net.embed.weight
    assert net.up.tied is net.down.weight
    with torch.no_grad():
        net.norm.running_var[8] = 5
    assert net.up.rows[0] == 5
    assert list(net.state_dict()) == list(state)
    assert net.scale is None
    assert net.up.extra is None
    assert not hasattr(net.up, "bias") or net.up.bias is None
    assert not net.up.weight.requires_grad
    assert net.down.weight.requires_grad
    assert net.norm.weight.requires_grad is (net.norm.weight.requires_grad and True)


def test_without_a_commit_the_folder_is_scratch(make: Make, tmp_path: Path) -> None:
    net = make()
    edit(net)
    net.up._parameters.sync()
    assert names_in(tmp_path / "off")
    del net
    gc.collect()
    assert not (tmp_path / "off").exists()


def test_an_unchanged_model_costs_nothing_to_commit_again(make: Make, tmp_path: Path) -> None:
    net = make()
    diskoffload.commit(net)
    before = shards_in(tmp_path / "off")
    size = (tmp_path / "off" / "diskoffload.journal").stat().st_size
    for _ in range(3):
        values(net)  # reading changes nothing
        made = diskoffload.commit(net)
    assert made.number == 4
    assert shards_in(tmp_path / "off") == before
    assert (tmp_path / "off" / "diskoffload.journal").stat().st_size < size + 3 * 200


def test_only_what_changed_is_written(make: Make, tmp_path: Path) -> None:
    net: Any = make()
    diskoffload.commit(net)
    before = set(shards_in(tmp_path / "off"))
    with torch.no_grad():
        for _ in range(5):
            net.down.weight.add_(1)
    diskoffload.commit(net)
    (new,) = set(shards_in(tmp_path / "off")) - before
    found = inspect_path(new)
    assert [one.name for one in found.tensors] == ["down.weight"]


def test_what_lies_in_memory_is_committed_too(tmp_path: Path) -> None:
    net = seeded()
    residency = Residency()
    diskoffload.offload_module(
        net.up, "cpu", "disk", offload_dir=tmp_path / "off", name="up", residency=residency
    )
    diskoffload.offload_module(net.down, "cpu", "cpu", name="down", residency=residency)
    made = diskoffload.commit(net)
    again = diskoffload.commit(net)
    assert again.shards == made.shards  # compared, not written again
    net.norm.bias.data.fill_(4)  # a plain module
    net.down.weight.data.fill_(5)  # in RAM
    expected = values(net)
    assert len(diskoffload.commit(net).shards) == len(made.shards) + 1
    del net
    check_values(diskoffload.reopen(tmp_path / "off", model=bare()), expected)


def test_a_deep_copy_is_another_model(make: Make, tmp_path: Path) -> None:
    net = make()
    diskoffload.commit(net)
    twin = copy.deepcopy(net)
    with pytest.raises(CommitError, match="commit 1 of another model"):
        diskoffload.commit(twin)
    diskoffload.commit(net)


def test_another_run_does_not_overwrite_what_was_committed(
    make: Make, bare_again: Make, tmp_path: Path
) -> None:
    net = make()
    edit(net)
    expected = values(net)
    diskoffload.commit(net)
    del net
    gc.collect()
    net = make()  # who forgot to reopen
    net.up.weight.data.zero_()
    with pytest.raises(CommitError, match=r"reopen"):
        diskoffload.commit(net)
    del net
    check_values(diskoffload.reopen(tmp_path / "off", model=bare_again()), expected)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    net = seeded()
    for name, module in net.named_modules():
        diskoffload.offload_module(module, "cpu", "disk", offload_dir=tmp_path / "off", name=name)
    diskoffload.commit(net)
    del net, module
    gc.collect()
    other: Any = bare()
    other.up = torch.nn.Linear(16, 65, device="meta")
    other.down = torch.nn.Linear(64, 16, device="meta").half()
    other.gate = torch.nn.Linear(2, 2, device="meta")
    del other.norm
    with pytest.raises(CommitError) as caught:
        diskoffload.reopen(tmp_path / "off", model=other)
    for part in (
        "norm.weight",
        "gate.weight",
        "up.bias (float32 [64] committed",
        "float16 [16, 64]",
    ):
        assert part in str(caught.value)
    with pytest.raises(InvalidInputError, match="give it as model"):
        diskoffload.reopen(tmp_path / "off")
    with pytest.raises(InvalidInputError, match="belongs to no checkpoint"):
        diskoffload.reopen(tmp_path / "off", model=bare(), source=tmp_path)
    net = diskoffload.reopen(tmp_path / "off", model=bare())
    with pytest.raises(AlreadyOffloadedError):
        diskoffload.reopen(tmp_path / "off", model=net)


def test_bad_input(make: Make, tmp_path: Path) -> None:
    net = make()
    with pytest.raises(InvalidInputError, match="JSON"):
        diskoffload.commit(net, note={1j})
    with pytest.raises(NotOffloadedError, match="nothing of this Net"):
        diskoffload.commit(seeded())
    for place in (tmp_path / "nowhere", tmp_path / "off"):
        with pytest.raises(CommitError, match="nothing was committed"):
            diskoffload.reopen(place, model=bare())
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InvalidInputError, match="verify"):
        diskoffload.reopen(tmp_path / "off", model=bare(), verify="often")  # type: ignore[arg-type]
    diskoffload.commit(net)
    net.up._parameters.folder.close()
    with pytest.raises(ClosedError):
        diskoffload.commit(net)


def test_readers_of_committed_state_need_no_lock(
    make: Make, bare_again: Make, tmp_path: Path
) -> None:
    net: Any = make()
    edit(net)
    expected = values(net)
    diskoffload.commit(net)
    reader: Any = diskoffload.reopen(tmp_path / "off", model=bare_again(), read_only=True)
    for number in range(4):
        net.up.weight = torch.nn.Parameter(torch.full((64, 16), float(number)))
        diskoffload.commit(net)
    check_values(reader, expected)
    reader.up.weight.data.zero_()
    reader.up._parameters.sync()
    assert (net.up.weight == 3).all()
    later: Any = diskoffload.reopen(tmp_path / "off", model=bare_again(), read_only=True)
    assert (later.up.weight == 3).all()


def test_a_second_owner_is_refused(make: Make, bare_again: Make, tmp_path: Path) -> None:
    import subprocess
    import sys

    net = make()
    diskoffload.commit(net)
    code = (
        "import sys, diskoffload\nfrom diskoffload.store.folder import Folder\n"
        "try:\n    Folder(sys.argv[1])\nexcept diskoffload.FolderInUseError: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "off")], capture_output=True, text=True
    )
    assert done.stdout == "refused\n", done.stderr
    assert FolderInUseError.__mro__[1].__name__ == "StorageError"
