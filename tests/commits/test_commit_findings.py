"""What reviewers have found of commits, reopening, saving and tidying up."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from commit_cases import bare, check_values, seeded, values
from safetensors.torch import save_file

import diskoffload
from diskoffload.cli import main
from diskoffload.errors import CommitError, DamagedFileError, InvalidInputError, OffloadError
from diskoffload.inspect import inspect_path
from diskoffload.residency.resident import Residency
from diskoffload.store.folder import Folder
from diskoffload.store.journal import JOURNAL_NAME
from diskoffload.store.sweeping import sweep
from diskoffload.verifying import verify


def checkpoint_in(folder: Path) -> Path:
    place = folder / "checkpoint"
    place.mkdir(parents=True)
    state = {name: value for name, value in seeded().state_dict().items() if name != "head.weight"}
    save_file(state, place / "model.safetensors")
    return place


def opened(place: Path, offload_dir: Path) -> Any:
    net = bare()
    net.table = torch.arange(16.0)
    return diskoffload.open_checkpoint(place, model=net, offload_dir=offload_dir)


def bare_again() -> torch.nn.Module:
    net = bare()
    net.table = torch.arange(16.0)
    return net


def test_a_note_that_is_changed_is_another_one(tmp_path: Path) -> None:
    """It was the very object that the next commit was compared with."""
    net = opened(checkpoint_in(tmp_path), tmp_path / "off")
    done: list[str] = []
    diskoffload.commit(net, note={"done": done})
    done = diskoffload.last_commit(net).note["done"]
    for name in ("up", "down"):
        done.append(name)
        diskoffload.commit(net, note={"done": done})
        assert diskoffload.last_commit(tmp_path / "off").note == {"done": done}


def test_edits_in_another_folder_are_no_part_of_the_source(tmp_path: Path) -> None:
    """What was in neither folder was taken for the source's, which had another value."""
    net = opened(checkpoint_in(tmp_path), tmp_path / "one")
    net.up.weight = torch.nn.Parameter(torch.full((64, 16), 3.0))
    net.up._parameters.sync()
    del net.up.weight.grad
    gc.collect()
    diskoffload.dispatch_model(net, max_memory={"cpu": 0}, offload_dir=tmp_path / "two")
    diskoffload.commit(net)
    expected = values(net)
    del net
    gc.collect()
    check_values(diskoffload.reopen(tmp_path / "two", model=bare_again()), expected)


def test_a_model_that_is_only_read_tells_its_commit_and_takes_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = opened(checkpoint_in(tmp_path), tmp_path / "off")
    net.up.weight = torch.nn.Parameter(torch.full((64, 16), 3.0))
    diskoffload.commit(net, note="mine")
    caplog.clear()
    read: Any = diskoffload.reopen(tmp_path / "off", model=bare_again(), read_only=True)
    assert "no offload_dir was given" not in caplog.text
    assert diskoffload.last_commit(read).note == "mine"
    assert diskoffload.last_commit(read).number == 1
    with pytest.raises(CommitError, match="read_only=True"):
        diskoffload.commit(read)


@pytest.mark.parametrize("how", ["replaced", "removed", "saved over"])
def test_a_source_that_is_gone_is_not_committed_to(tmp_path: Path, how: str) -> None:
    place = checkpoint_in(tmp_path)
    net = opened(place, tmp_path / "off")
    diskoffload.commit(net)
    net.up.weight = torch.nn.Parameter(torch.full((64, 16), 3.0))
    if how == "saved over":
        diskoffload.save_checkpoint(net, place, overwrite=True)
    else:
        (place / "model.safetensors").rename(place / "elsewhere")
        if how == "replaced":
            save_file({"x": torch.ones(3)}, place / "model.safetensors")
    with pytest.raises(CommitError, match=r"model.safetensors was changed, replaced or removed"):
        diskoffload.commit(net)
    if how == "removed":
        (place / "elsewhere").rename(place / "model.safetensors")
        assert diskoffload.commit(net).number == 2


def test_a_source_of_which_only_the_time_was_changed(tmp_path: Path) -> None:
    place = checkpoint_in(tmp_path)
    net = opened(place, tmp_path / "off")
    diskoffload.commit(net)
    expected = values(net)
    del net
    gc.collect()
    os.utime(place / "model.safetensors")
    with pytest.raises(CommitError, match="only times were changed, name its place as source"):
        diskoffload.reopen(tmp_path / "off", model=bare_again())
    again = diskoffload.reopen(tmp_path / "off", model=bare_again(), source=place)
    check_values(again, expected)


def test_an_offload_folder_is_no_place_for_a_result(tmp_path: Path) -> None:
    net = opened(checkpoint_in(tmp_path), tmp_path / "off")
    net.up.weight = torch.nn.Parameter(torch.full((64, 16), 3.0))
    diskoffload.commit(net)
    expected = values(net)
    with pytest.raises(InvalidInputError, match="it is an offload folder"):
        diskoffload.save_checkpoint(net, tmp_path / "off", overwrite=True)
    del net
    gc.collect()
    check_values(diskoffload.reopen(tmp_path / "off", model=bare_again()), expected)


def test_what_is_ours_in_a_checkpoint_is_not_published(tmp_path: Path) -> None:
    place = checkpoint_in(tmp_path)
    net = opened(place, place / "off")
    diskoffload.commit(net)
    diskoffload.save_checkpoint(net, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not [name for name in names if name.startswith("diskoffload")]


def test_a_plain_module_may_change_before_the_first_commit(tmp_path: Path) -> None:
    net: Any = seeded()
    diskoffload.offload_module(net.up, "cpu", "disk", offload_dir=tmp_path / "off", name="up")
    net.down.weight = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
    net.norm.register_buffer("more", torch.ones(2))
    diskoffload.commit(net)
    expected = values(net)
    del net
    gc.collect()
    check_values(diskoffload.reopen(tmp_path / "off", model=bare()), expected)


def test_garbage_of_tensors_in_memory_is_bounded(tmp_path: Path) -> None:
    """A file stayed for the one tensor of it that never changed."""
    layers = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(20))
    model = torch.nn.ModuleDict({"layers": layers, "on_disk": torch.nn.Linear(4, 4)})
    diskoffload.offload_module(model["on_disk"], "cpu", "disk", offload_dir=tmp_path / "off")
    for number in range(20):  # one more stays as it is each time
        for layer in layers[number:]:
            layer.weight.data.normal_()
        diskoffload.commit(model)
        gc.collect()
    alive = sum(layer.weight.nbytes for layer in layers)
    taken = sum(path.stat().st_size for path in (tmp_path / "off").glob("*.safetensors"))
    assert taken <= 2 * alive + (2 << 20)


@pytest.mark.parametrize("how", ["assigned", "updated", "edited"])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_repeated_updates_cost_one_write(tmp_path: Path, how: str, group_bytes: int) -> None:
    """A tensor as large as a group was written each time."""
    folder = Folder(tmp_path / "off", group_bytes=group_bytes)
    module = torch.nn.Linear(256, 256, bias=False)
    diskoffload.offload_module(module, "cpu", "disk", offload_dir=folder)
    diskoffload.commit(module)
    before = folder._writer.written_bytes
    for number in range(10):
        value = torch.full((256, 256), float(number))
        if how == "assigned":
            module.weight = torch.nn.Parameter(value)
        elif how == "updated":
            diskoffload.update_offload_parameter(module, "weight", value)
        else:
            with torch.no_grad():
                module.weight.copy_(value)
    diskoffload.commit(module)
    written_bytes = folder._writer.written_bytes - before
    assert value.nbytes <= written_bytes <= 1.1 * value.nbytes
    expected = values(module)
    del module, folder
    gc.collect()
    check_values(
        diskoffload.reopen(tmp_path / "off", model=torch.nn.Linear(256, 256, bias=False)), expected
    )


# ---------------------------------------------------------------- what a journal may say


def forged(place: Path, changes: Any) -> None:
    """Write a journal of one record whose checksum is right, whatever it says."""
    line = (place / JOURNAL_NAME).read_bytes().splitlines()[0]
    record = json.loads(line[26:])
    changes(record)
    text = json.dumps({**record, "record": 1}).encode()
    rest = b"%08x %s" % (len(text), text)
    checksum = xxhash.xxh3_64_hexdigest(rest).encode()
    (place / JOURNAL_NAME).write_bytes(checksum + b" " + rest + b"\n")


def entry_of(record: Any) -> Any:
    return next(entry for entry in record["entries"].values() if isinstance(entry["at"], list))


def view(record: Any, **changes: Any) -> None:
    at = {"view": "x", "dtype": "float32", "shape": [1], "strides": [1], "offset_bytes": 0}
    entry_of(record)["at"] = {**at, **changes}


ABSURD = {
    "a file elsewhere": lambda r: r["shards"].update({"../victim.safetensors": [9, "0"]}),
    "an absolute file": lambda r: r["shards"].update({"/etc/passwd": [9, "0"]}),
    "a file without a length": lambda r: r["shards"].update({key: [] for key in r["shards"]}),
    "a negative length": lambda r: r["shards"].update({key: [-1, "0"] for key in r["shards"]}),
    "a file not committed": lambda r: r.update(shards={}),
    "no files": lambda r: r.update(shards=None),
    "entries are a list": lambda r: r.update(entries=[1]),
    "an entry is a text": lambda r: r["entries"].update(x="y"),
    "at a number": lambda r: entry_of(r).update(at=3),
    "at a list of one": lambda r: entry_of(r).update(at=["x"]),
    "at nothing known": lambda r: entry_of(r).update(at={"moon": 1}),
    "at two places": lambda r: entry_of(r).update(at={"source": "a", "tie": "b"}),
    "a tie to a number": lambda r: entry_of(r).update(at={"tie": 3}),
    "of no kind": lambda r: entry_of(r).update({"is": "fish"}),
    "kind is a list": lambda r: entry_of(r).update({"is": []}),
    "no gradient": lambda r: entry_of(r).update({"is": "parameter", "grad": 3}),
    "negative strides": lambda r: entry_of(r).update(strides=[-1]),
    "strides are a text": lambda r: entry_of(r).update(strides="ab"),
    "view of an unknown dtype": lambda r: view(r, dtype="float3"),
    "view of a function": lambda r: view(r, dtype="add"),
    "view with too few strides": lambda r: view(r, strides=[]),
    "view before its root": lambda r: view(r, offset_bytes=-4),
    "born as a list": lambda r: r.update(born=[1, 2]),
    "born with a text for a shape": lambda r: r.update(born={"x": ["float32", "abc"]}),
    "source is a number": lambda r: r.update(source=3),
    "source without a path": lambda r: r.update(source={"files": {}}),
    "source of an unknown dtype": lambda r: r.update(
        source={"path": "/x", "dtype": "os", "files": {}}
    ),
    "number is a text": lambda r: r.update(commit="x"),
    "seconds are a list": lambda r: r.update(seconds=[]),
}


@pytest.mark.parametrize("which", ABSURD)
def test_an_absurd_journal_is_damage(tmp_path: Path, which: str) -> None:
    net = seeded()
    for module in net.modules():
        diskoffload.offload_module(module, "cpu", "disk", offload_dir=tmp_path / "off")
    diskoffload.commit(net)
    del net, module
    gc.collect()
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(b"precious")
    forged(tmp_path / "off", ABSURD[which])
    before = {path.name for path in (tmp_path / "off").glob("*.safetensors")}
    with pytest.raises(DamagedFileError, match="a record cannot be understood"):
        diskoffload.reopen(tmp_path / "off", model=bare())
    assert verify(tmp_path / "off").faults
    assert victim.read_bytes() == b"precious"
    assert {path.name for path in (tmp_path / "off").glob("*.safetensors")} == before


def test_a_journal_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / JOURNAL_NAME, "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(DamagedFileError, match="more than any journal of ours"):
        diskoffload.last_commit(tmp_path)


# ---------------------------------------------------------------- tidying up


def test_dry_runs_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "off"
    net = opened(checkpoint_in(tmp_path), place)
    net.up.weight = torch.nn.Parameter(torch.full((64, 16), 3.0))
    diskoffload.commit(net)
    del net
    gc.collect()
    (place / "diskoffload-0123abcd-00001.safetensors").write_bytes(b"left")
    (place / "diskoffload.lock").write_bytes(b"12345\n")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert main(["compact", str(place), "--dry-run"]) == 0
    assert main(["sweep", str(place), "--dry-run"]) == 0
    assert "00001.safetensors" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert len(sweep(place)) == 2


SAVE = """
import os, signal, sys
import torch
import diskoffload
from diskoffload.system.files import Files

class Killed(Files):
    def rename(self, source, target):
        if target.suffix == ".safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        super().rename(source, target)

import diskoffload.checkpoint.save as save
save.Files = Killed
diskoffload.save_checkpoint(torch.nn.Linear(300, 300), sys.argv[1])
"""


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def kill() -> Path:
        command = [sys.executable, "-c", textwrap.dedent(SAVE), str(out)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        (left,) = tmp_path.glob(".out.*.partial")
        return left

    left = kill()
    assert [one.path.parent for one in sweep(tmp_path, dry_run=True)] == [left, left]
    assert left.exists()
    sweep(tmp_path)
    assert not left.exists()
    left = kill()
    (tmp_path / ".out.0123abcd.partial").mkdir()  # somebody else's, or only just made
    diskoffload.save_checkpoint(torch.nn.Linear(3, 3), out)
    assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.0123abcd.partial", "out"]
    assert not list(out.glob("*lock*"))


def test_a_folder_that_cannot_be_listed_is_not_called_sound(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may list any folder")
    (tmp_path / "closed").mkdir(mode=0o300)
    with pytest.raises(OffloadError, match="list the folder"):
        verify(tmp_path / "closed")


def test_verifying_a_folder_in_use_finds_no_fault(tmp_path: Path) -> None:
    residency = Residency()
    net: Any = seeded()
    for name, module in net.named_modules():
        diskoffload.offload_module(
            module, "cpu", "disk", offload_dir=tmp_path / "off", name=name, residency=residency
        )
    diskoffload.commit(net)
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from diskoffload.verifying import verify\n"
            "for _ in range(150):\n"
            "    found = verify(sys.argv[1])\n"
            "    assert not found.faults, found\n",
            str(tmp_path / "off"),
        ]
    )
    number = 0
    while reader.poll() is None:
        number += 1
        for module in (net.up, net.down, net.norm, net.embed):
            module.weight = torch.nn.Parameter(torch.full_like(module.weight, float(number)))
        diskoffload.commit(net)
    assert reader.returncode == 0
    assert number > 20


def test_what_somebody_holds_is_alive_in_its_file(tmp_path: Path) -> None:
    net = torch.nn.Linear(300, 300)
    held = net.weight
    diskoffload.offload_module(net, "cpu", "disk", offload_dir=tmp_path / "off")
    made = diskoffload.commit(net)
    # Else the file would seem to hold nothing but the bias, which would be written once more.
    assert len(made.shards) == 1
    (shard,) = inspect_path(tmp_path / "off").shards
    assert sorted(one.name for one in shard.tensors if "filler" not in one.name) == [
        "bias",
        "weight",
    ]
    del held
