"""A journal that is lost: what was committed is not taken for what a dead process left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commit_cases import names_in, shards_in

import diskoffload
from diskoffload.cli import main
from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.folder import Folder
from diskoffload.store.journal import JOURNAL_NAME
from diskoffload.store.marker import MARKER_NAME, Marker
from diskoffload.system.files import Files


def offloaded(place: Path) -> torch.nn.Linear:
    module = torch.nn.Linear(8, 8)
    with torch.no_grad():
        module.weight.fill_(3)
    diskoffload.offload_module(module, "cpu", "disk", offload_dir=place)
    return module


def bare() -> torch.nn.Linear:
    return torch.nn.Linear(8, 8, device="meta")


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    place = tmp_path / "off"
    diskoffload.commit(offloaded(place))
    assert MARKER_NAME in names_in(place)
    return place


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("lose", [Path.unlink, empty, cut_off])
def test_what_was_committed_stays(
    committed: Path, lose: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    journal = committed / JOURNAL_NAME
    before = journal.read_bytes()
    lose(journal)
    names = names_in(committed)
    actions: list[Callable[[], Any]] = [
        lambda: Folder(committed),
        lambda: offloaded(committed),
        lambda: diskoffload.reopen(committed, model=bare()),
        lambda: diskoffload.reopen(committed, model=bare(), read_only=True),
        lambda: diskoffload.last_commit(committed),
        lambda: diskoffload.sweep(committed),
        lambda: diskoffload.sweep(committed, dry_run=True),
    ]
    for action in actions:
        with pytest.raises(DamagedFileError, match=r"holds commits .* in 1 files they are"):
            action()
    for command in ("verify", "sweep", "compact"):
        assert main([command, str(committed)]) == 1
        said = capsys.readouterr()
        assert "put that file back" in said.out + said.err
    assert names_in(committed) == names
    journal.write_bytes(before)
    assert diskoffload.reopen(committed, model=bare()).weight[0, 0].item() == 3


def test_a_folder_of_which_nothing_is_left_can_be_used_again(committed: Path) -> None:
    for path in [*shards_in(committed), committed / JOURNAL_NAME]:
        path.unlink()
    module = offloaded(committed)
    diskoffload.commit(module)
    del module
    assert diskoffload.reopen(committed, model=bare()).weight[0, 0].item() == 3


def test_a_killed_scratch_folder_is_swept(tmp_path: Path) -> None:
    program = (
        "import os, signal, torch, diskoffload\n"
        "module = torch.nn.Linear(8, 8)\n"
        f"diskoffload.offload_module(module, 'cpu', 'disk', offload_dir={str(tmp_path)!r})\n"
        "module._parameters.sync()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert len(shards_in(tmp_path)) == 1
    Folder(tmp_path)
    assert names_in(tmp_path) == []


def test_a_commit_that_was_killed_before_its_mark_gets_one(committed: Path) -> None:
    (committed / MARKER_NAME).unlink()
    Folder(committed)
    assert (committed / MARKER_NAME).is_file()
    assert len(shards_in(committed)) == 1


def test_a_mark_that_cannot_be_made_costs_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(marker: Marker) -> None:
        raise StorageError(28, "no room", str(marker.path))

    place = tmp_path / "off"
    module = offloaded(place)
    with monkeypatch.context() as patch:
        patch.setattr(Marker, "leave", refuse)
        assert diskoffload.commit(module).number == 1
    assert "nobody will notice" in caplog.text
    assert not (place / MARKER_NAME).exists()
    with torch.no_grad():
        module.weight.fill_(4)
    diskoffload.commit(module)
    assert (place / MARKER_NAME).is_file()


def test_the_mark_is_made_after_the_commit_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    for name in ("sync", "sync_folder", "create"):
        whole: Any = getattr(Files, name)

        def note(files: Files, *arguments: Any, name: str = name, whole: Any = whole) -> Any:
            done.append((name, arguments[-1].name))
            return whole(files, *arguments)

        monkeypatch.setattr(Files, name, note)
    diskoffload.commit(offloaded(tmp_path / "off"))
    at = done.index(("create", MARKER_NAME))
    assert ("sync_folder", "off") in done[done.index(("create", JOURNAL_NAME + ".new")) : at]
    assert done[at:] == [("create", MARKER_NAME), ("sync_folder", "off")]


def test_what_others_have_in_its_place_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "off"
    module = offloaded(place)
    (place / MARKER_NAME).symlink_to(tmp_path / "nothing")
    assert diskoffload.commit(module).number == 1
    assert "nobody will notice" in caplog.text
    assert (place / MARKER_NAME).is_symlink()
    assert not (tmp_path / "nothing").exists()
