"""Names that try to leave the folder, other people's files in it, and clocks that jump."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
import torch
from fault_cases import bare, check, check_reopened, edit, offloaded, values

import diskoffload
from diskoffload.checkpoint.publish import copy_side_files
from diskoffload.residency.resident import Residency
from diskoffload.store.folder import Folder
from diskoffload.store.marker import MARKER_NAME
from diskoffload.store.sweeping import sweep

NAMES = [
    "",
    "../outside",
    "/etc/outside",
    "..",
    "/",
    "\0nul",
    "a\nline",
    "x" * 5000,
    "数据",
    "e\u0301",
    "\u00e9",
    "\udc80",
    "__metadata__",
    "diskoffload.journal",
    "nul\0#2",
    "con ",
    '"quoted\\',
    "#1",
]


class Named(torch.nn.Module):
    """Parameters and modules of names that nobody would give, but for an attacker."""

    def __init__(self) -> None:
        super().__init__()
        for number, name in enumerate(name for name in NAMES if name and "." not in name):
            # torch refuses names with dots, and empty ones
            self.register_parameter(name, torch.nn.Parameter(torch.full((40,), float(number))))
            self.add_module(name + "!", torch.nn.Linear(3, 3))


def test_a_name_is_a_key_in_a_file_and_never_a_files_name(tmp_path: Path) -> None:
    around = tmp_path / "around"
    around.mkdir()
    (around / "outside").write_text("mine")
    place = around / "off"
    torch.manual_seed(0)
    net, residency = Named(), Residency()
    expected = values(net)
    for name, module in list(net.named_modules()):
        diskoffload.offload_module(
            module, "cpu", "disk", offload_dir=place, name=name, residency=residency
        )
    check(net, expected)
    diskoffload.commit(net, note=NAMES[:3])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    expected = values(net)
    diskoffload.commit(net)
    names = {path.name for path in place.iterdir()} - {MARKER_NAME}
    assert all(name.startswith("diskoffload") for name in names)
    del net, module, parameter
    gc.collect()
    with torch.device("meta"):
        again = Named()
    check(diskoffload.reopen(place, model=again, verify="full"), expected)
    assert sorted(path.name for path in around.iterdir()) == ["off", "outside"]
    assert (around / "outside").read_text() == "mine"
    assert not Path("/etc/outside").exists()


@pytest.mark.parametrize("name", NAMES)
def test_each_name_alone_is_written_and_read(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / "off")
    tickets = [folder.put(name, torch.full((9,), float(n)), None) for n in range(2)]
    folder.flush()
    for number, ticket in enumerate(tickets):
        assert ticket.stored is not None
        assert torch.equal(ticket.stored.load(), torch.full((9,), float(number)))


# ---------------------------------------------------------------- files of others


def test_a_name_with_dots_in_it_comes_back(tmp_path: Path) -> None:
    """No way of torch's own gives one, but who writes to the dictionary can."""

    class Dotted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)
            for number, name in enumerate(("../x", ".", "a.b", "/etc/x")):
                self.inner._parameters[name] = torch.nn.Parameter(torch.full((4,), float(number)))

    net = Dotted()
    diskoffload.offload_module(net.inner, "cpu", "disk", offload_dir=tmp_path / "off")
    with torch.no_grad():
        for name in ("../x", "a.b"):
            net.inner._parameters[name].add_(10)
    expected = values(net)
    diskoffload.commit(net)
    del net
    gc.collect()
    check(diskoffload.reopen(tmp_path / "off", model=Dotted(), verify="full"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["off"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    place, precious = tmp_path / "off", tmp_path / "precious"
    place.mkdir()
    precious.write_text("mine")
    others = {
        "notes.txt": "mine",
        "diskoffload.txt": "mine",
        "diskoffload-notes.safetensors": "mine",
        "model.safetensors": "mine",
        "diskoffload-0123abcd-00001.safetensors.bak": "mine",
    }
    for name, text in others.items():
        (place / name).write_text(text)
    (place / "diskoffload-0123abcd-00002.safetensors").symlink_to(precious)
    (place / "diskoffload-0123abcd-00003.safetensors").mkdir()
    (place / "linked").symlink_to(tmp_path)
    before = sorted(path.name for path in place.iterdir())
    net = offloaded(place)
    diskoffload.commit(net)
    edit(net, 3)
    diskoffload.commit(net)
    made = {path.name for path in place.iterdir()} - set(before)
    del net
    gc.collect()
    sweep(place)
    left = {path.name for path in place.iterdir()}
    assert left - set(before) <= made - {"diskoffload.lock"}
    assert set(before) <= left
    for name, text in others.items():
        assert (place / name).read_text() == text
    assert precious.read_text() == "mine"


def test_a_scratch_folder_that_we_made_stays_if_others_use_it(tmp_path: Path) -> None:
    place = tmp_path / "off"
    net = offloaded(place)
    net.up._parameters.sync()
    (place / "notes.txt").write_text("mine")
    del net
    gc.collect()
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


def test_a_shard_linked_elsewhere_keeps_its_content_there(tmp_path: Path) -> None:
    place = tmp_path / "off"
    net = offloaded(place)
    diskoffload.commit(net)
    linked = {}
    for number, path in enumerate(sorted(place.glob("*.safetensors"))):
        os.link(path, tmp_path / f"{number}.safetensors")
        linked[tmp_path / f"{number}.safetensors"] = path.read_bytes()
    for factor in (3, 5, 7):  # every tensor is replaced, so the first files go
        after = edit(net, factor)
        diskoffload.commit(net)
    del net
    check_reopened(place, after)
    assert linked
    for path, content in linked.items():
        assert path.read_bytes() == content


def test_a_folder_reached_through_a_link_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    net = offloaded(tmp_path / "link")
    expected = values(net)
    diskoffload.commit(net)
    del net
    check_reopened(tmp_path / "real", expected)
    assert (tmp_path / "link").is_symlink()


# ---------------------------------------------------------------- clocks


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "off"
    net = offloaded(place)
    numbers, seconds = [], []
    for now in (2e9, 1e9, 0.0, -5.0, 4e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        after = edit(net, 3)
        made = diskoffload.commit(net)
        numbers.append(made.number)
        seconds.append(made.seconds)
    assert numbers == [1, 2, 3, 4, 5]
    assert seconds == [2e9, 1e9, 0.0, -5.0, 4e9]  # informative, and nothing more
    del net
    gc.collect()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    net = diskoffload.reopen(place, model=bare(), verify="full")
    check(net, after)
    assert diskoffload.last_commit(net).number == 5
    assert diskoffload.commit(net).number == 6


# ---------------------------------------------------------------- beside the weights


@pytest.mark.parametrize("as_in_the_cache", [False, True])
def test_a_link_out_of_the_checkpoint_is_not_published(
    tmp_path: Path, as_in_the_cache: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub's cache is links to its own blobs; a link to anything else is nobody's business."""
    place = tmp_path / ("models--a/snapshots/1" if as_in_the_cache else "checkpoint")
    blobs = tmp_path / "models--a" / "blobs"
    for folder in (place, blobs):
        folder.mkdir(parents=True)
    (blobs / "0a").write_text("a tokenizer")
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (place / "LICENSE").symlink_to(secret)
    (place / "README.md").write_text("read me")
    (place / "USE.md").symlink_to("README.md")
    (place / "tokenizer.json").symlink_to(blobs / "0a")
    (place / "deep").symlink_to(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    found = copy_side_files(place, target)
    expected = {"README.md", "USE.md"} | ({"tokenizer.json"} if as_in_the_cache else set())
    assert set(found) == expected
    assert not any("secret" in (target / name).read_text() for name in found)
    assert "LICENSE is a link to" in caplog.text
