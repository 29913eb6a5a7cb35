"""Damage is found and named; garbage is bounded, and goes."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from commit_cases import Make, bare, check_values, names_in, seeded, shards_in, values
from safetensors.torch import save_file

import diskoffload
from diskoffload.cli import main
from diskoffload.errors import (
    CommitError,
    DamagedFileError,
    FolderInUseError,
    InvalidInputError,
)
from diskoffload.inspect import inspect_path
from diskoffload.residency.resident import Residency
from diskoffload.store.folder import Folder


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.fixture
def committed(make: Make, tmp_path: Path) -> Path:
    net: Any = make()
    with torch.no_grad():
        net.up.weight.copy_(torch.arange(1024.0).view(64, 16))
        net.down.weight.zero_()
    diskoffload.commit(net)
    del net
    names_in(tmp_path / "off")
    return tmp_path / "off"


def test_nothing_is_found_where_nothing_is_wrong(committed: Path, capsys: Any) -> None:
    found = diskoffload.verify(committed)
    assert found.faults == []
    assert found.commit == 1
    assert found.checked == sum(len(one.tensors) for one in inspect_path(committed).shards)
    assert found.unchecked == 0
    assert main(["verify", str(committed)]) == 0
    assert "no fault was found" in capsys.readouterr().out


def test_a_wrong_byte_of_data_is_named(committed: Path, bare_again: Make, capsys: Any) -> None:
    ((shard, tensor),) = [
        (Path(info.path), one)
        for info in inspect_path(committed).shards
        for one in info.tensors
        if one.name == "up.weight"
    ]
    flip(shard, tensor.offset + tensor.stored_bytes // 2)
    (fault,) = diskoffload.verify(committed).faults
    assert (fault.file, fault.tensor, fault.offset) == (str(shard), "up.weight", tensor.offset)
    assert main(["verify", str(committed), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"][0]["tensor"] == "up.weight"
    with pytest.raises(DamagedFileError, match=f"'up.weight' at offset {tensor.offset}"):
        diskoffload.reopen(committed, model=bare_again(), verify="full")
    net: Any = diskoffload.reopen(committed, model=bare_again(), verify="first_read")
    assert not net.down.weight.any()
    with pytest.raises(DamagedFileError, match=f"'up.weight' at offset {tensor.offset}"):
        net.up.weight  # noqa: B018
    del net
    net = diskoffload.reopen(committed, model=bare_again())
    if tensor.compression is None:
        assert net.up.weight is not None  # a mapped tensor is not looked at, at no cost
        net.up._parameters.residency.make_room(1 << 60)
    with pytest.raises(DamagedFileError, match=r"'up.weight'"):
        # What passes through our hands always is.
        dict(net.up._parameters.held_items())["weight"].backing.load(torch.device("cpu"))


def test_every_byte_of_a_shard_is_guarded(committed: Path, tmp_path: Path) -> None:
    shard = shards_in(committed)[-1]
    whole = shard.read_bytes()
    infos = inspect_path(shard)
    header_bytes = infos.shards[0].header_bytes
    data = [(one.offset, one.offset + one.stored_bytes) for one in infos.tensors]
    step = max(1, len(whole) // 400)
    for place in [*range(8, header_bytes, 7), *range(header_bytes, len(whole), step)]:
        if place >= header_bytes and not any(start <= place < stop for start, stop in data):
            continue  # filler between tensors, which nobody reads
        flip(shard, place)
        assert diskoffload.verify(committed).faults, place
        shard.write_bytes(whole)
    assert not diskoffload.verify(committed).faults


@pytest.mark.parametrize("harm", ["truncated", "extended", "gone", "replaced"])
def test_a_file_that_is_not_the_committed_one_is_named(
    harm: str, committed: Path, bare_again: Make
) -> None:
    shard = shards_in(committed)[-1]
    if harm == "gone":
        shard.unlink()
    elif harm == "replaced":
        content = torch.nn.Linear(3, 3).state_dict()
        shard.unlink()
        save_file(content, shard)
    else:
        size = shard.stat().st_size
        os.truncate(shard, size - 1 if harm == "truncated" else size + 1)
    faults = diskoffload.verify(committed).faults
    assert faults
    assert all(str(shard) in fault.reason for fault in faults)
    with pytest.raises(diskoffload.StorageError, match=shard.name):
        diskoffload.reopen(committed, model=bare_again())
    assert names_in(committed)[-2:] == ["diskoffload.journal", "holds-commits.txt"]


def test_a_damaged_journal_is_named_and_nothing_is_removed(
    committed: Path, bare_again: Make, make: Make
) -> None:
    flip(committed / "diskoffload.journal", 60)
    before = names_in(committed)
    (fault,) = diskoffload.verify(committed).faults
    assert "record 1 at offset 0 is damaged" in fault.reason
    for action in (
        lambda: diskoffload.reopen(committed, model=bare_again()),
        make,
        lambda: diskoffload.sweep(committed),
    ):
        with pytest.raises(DamagedFileError, match="record 1 at offset 0"):
            action()
    assert names_in(committed) == before


@pytest.mark.parametrize("way", ["opened"])
def test_a_source_that_was_changed_is_refused(
    committed: Path, bare_again: Make, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copy)
    file = source / "model.safetensors"
    status = file.stat()
    shutil.move(source, tmp_path / "moved")
    with pytest.raises(CommitError, match="name the place it was moved to as source"):
        diskoffload.reopen(committed, model=bare_again())
    for place in ("moved", "copy"):
        net = diskoffload.reopen(committed, model=bare_again(), source=tmp_path / place)
        check_values(net, {**values(net)})
        del net
    # Another model of the same size and header, with the same times.
    other = tmp_path / "moved" / "model.safetensors"
    flip(other, status.st_size - 5)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CommitError, match="another data"):
        diskoffload.reopen(committed, model=bare_again(), source=tmp_path / "moved")
    shutil.move(tmp_path / "moved", source)
    assert "another data" in diskoffload.verify(committed).faults[0].reason


def test_sweeping_removes_only_what_nobody_needs(committed: Path, capsys: Any) -> None:
    kept = names_in(committed)
    for name in (
        "diskoffload-0123abcd-00001.safetensors",
        "diskoffload-0123abcd-00002.safetensors.partial",
        "diskoffload.journal.new",
    ):
        (committed / name).write_bytes(b"left")
    for name in ("model.safetensors", "diskoffload-mine.safetensors", "notes.txt"):
        (committed / name).write_bytes(b"mine")
    os.symlink("notes.txt", committed / "diskoffload-0123abcd-00003.safetensors")
    everything = names_in(committed)
    would = diskoffload.sweep(committed, dry_run=True)
    assert names_in(committed) == everything
    assert main(["sweep", "--dry-run", str(committed)]) == 0
    assert "3 files" in capsys.readouterr().out
    assert diskoffload.sweep(committed) == would
    assert len(would) == 3
    left = set(names_in(committed)) - set(kept)
    assert left == {
        "model.safetensors",
        "diskoffload-mine.safetensors",
        "notes.txt",
        "diskoffload-0123abcd-00003.safetensors",
    }


def test_sweeping_a_folder_in_use_is_refused(make: Make, tmp_path: Path) -> None:
    net = make()
    with pytest.raises(FolderInUseError):
        diskoffload.sweep(tmp_path / "off")
    del net


def test_sweeping_finds_temporary_folders(tmp_path: Path) -> None:
    left = tmp_path / "diskoffload-ab12_xyz"
    left.mkdir()
    (left / "diskoffload-0123abcd-00001.safetensors").write_bytes(b"left")
    (left / "diskoffload.lock").write_bytes(b"1\n")
    assert len(diskoffload.sweep(tmp_path)) == 2
    assert not left.exists()


def test_garbage_is_bounded(tmp_path: Path) -> None:
    net = seeded()
    residency = Residency()
    for name, module in net.named_modules():
        diskoffload.offload_module(
            module, "cpu", "disk", offload_dir=tmp_path / "off", name=name, residency=residency
        )
    diskoffload.commit(net)
    live = sum(path.stat().st_size for path in shards_in(tmp_path / "off"))
    most = most_files = 0
    for number in range(80):
        part: Any = [net.up, net.down, net.norm][number % 3]
        diskoffload.update_offload_parameter(part, "weight", torch.tensor(float(number)))
        diskoffload.commit(net)
        residency.make_room(1 << 60)
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "off").iterdir()))
        most_files = max(most_files, len(names_in(tmp_path / "off")))
    # Small files have headers of their own, and the journal lies beside them.
    assert most < 4 * live + (128 << 10)
    assert most_files < 70
    expected = values(net)
    del net, module, part
    names_in(tmp_path / "off")
    check_values(diskoffload.reopen(tmp_path / "off", model=bare(), verify="full"), expected)


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # it got its name meanwhile
            total += path.stat().st_size
    return total


def test_garbage_is_bounded_without_commits(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "off", group_bytes=8 << 20)
    net = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(12)])
    residency = Residency()
    for name, module in net.named_modules():
        diskoffload.offload_module(
            module, "cpu", "disk", offload_dir=folder, name=name, residency=residency
        )
    choose = random.Random(0)
    most = 0
    for number in range(150):  # the last one is never replaced, and keeps its file
        part: Any = net[choose.randrange(11)]
        part.weight = torch.nn.Parameter(torch.full((512, 512), float(number)))
        most = max(most, bytes_in(tmp_path / "off"))
    live = 12 << 20
    # What is alive, as much garbage, what was written since the last look, a group on its way.
    assert most < 3 * live + (16 << 20)
    folder.flush()
    del net, module, part


def test_a_mapped_tensor_is_not_compacted_away(tmp_path: Path) -> None:
    net: Any = seeded()
    for name, module in net.named_modules():
        diskoffload.offload_module(module, "cpu", "disk", offload_dir=tmp_path / "off", name=name)
    diskoffload.commit(net)
    (first,) = shards_in(tmp_path / "off")
    view = net.norm.weight.data
    for part in (net.up, net.down, net.head):
        part.weight = torch.nn.Parameter(torch.ones(2, 2))
    diskoffload.commit(net)
    assert first in shards_in(tmp_path / "off")
    view.fill_(9)
    diskoffload.commit(net)
    assert (net.norm.weight == 9).all()
    del view
    diskoffload.commit(net)
    assert first not in shards_in(tmp_path / "off")
    expected = values(net)
    del net, module, part
    names_in(tmp_path / "off")
    check_values(diskoffload.reopen(tmp_path / "off", model=bare()), expected)


def test_compacting_a_folder_at_rest(
    way: str, committed: Path, bare_again: Make, capsys: Any
) -> None:
    net: Any = diskoffload.reopen(committed, model=bare_again())
    kept = net.norm.weight.data  # keeps the file from being compacted while the model is there
    for part in (net.up, net.down, net.embed, net.head):
        part.weight = torch.nn.Parameter(torch.ones(2, 2))
    diskoffload.commit(net)
    expected = values(net)
    del net, part, kept
    before = {path: path.stat().st_size for path in shards_in(committed)}
    assert main(["compact", str(committed), "--dry-run"]) == 0
    assert {path: path.stat().st_size for path in shards_in(committed)} == before
    assert main(["compact", str(committed), "--json"]) == 0
    said = capsys.readouterr().out
    done = json.loads(said[said.index("{") :])
    after = {path: path.stat().st_size for path in shards_in(committed)}
    assert len(set(before) - set(after)) == done["files"]
    assert (done["files"] > 0) == (way != "zstd")  # a copy in memory keeps no file
    assert not diskoffload.verify(committed).faults
    check_values(diskoffload.reopen(committed, model=bare_again(), verify="full"), expected)


@pytest.mark.parametrize("way", ["opened"])
def test_a_moved_source_can_be_named(committed: Path, tmp_path: Path, capsys: Any) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "checkpoint", moved, copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "checkpoint")
    (fault,) = diskoffload.verify(committed).faults
    assert "which is not there; name the place it was moved to" in fault.reason
    assert diskoffload.verify(committed, source=moved).faults == []
    assert main(["verify", str(committed), "--source", str(moved)]) == 0
    file = moved / "model.safetensors"
    flip(file, file.stat().st_size - 1)
    assert main(["verify", str(committed), "--source", str(moved)]) == 1
    assert "was changed or replaced since the commit" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["scratch"])
def test_a_source_of_what_has_none_is_refused(committed: Path, tmp_path: Path) -> None:
    for path in (committed, next(committed.glob("*.safetensors"))):
        with pytest.raises(InvalidInputError, match=r"belongs to no checkpoint; leave source="):
            diskoffload.verify(path, source=tmp_path)
