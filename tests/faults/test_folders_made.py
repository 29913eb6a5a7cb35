"""Folders that we made go again, parents included, if what they were for came to nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_cases import offloaded

import diskoffload
from diskoffload.errors import NoSpaceError, OffloadError, StorageError
from diskoffload.resumable.lock import FolderLock
from diskoffload.store.folder import Folder
from diskoffload.system.files import Files


@pytest.mark.parametrize("inodes", [2, 3, 4], ids=["one folder", "two folders", "three folders"])
def test_a_failed_open_leaves_no_folder(mounted: Callable[[str], Path], inodes: int) -> None:
    disk = mounted(f"nr_inodes={inodes}")  # one of them is the root's
    for make in (Folder, lambda path: FolderLock(path, Files())):
        with pytest.raises(NoSpaceError):
            make(disk / "a" / "b" / "c")
        assert list(disk.iterdir()) == []


def test_what_could_not_be_opened_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OffloadError):
        diskoffload.open_checkpoint(tmp_path / "none", offload_dir=tmp_path / "a" / "off")
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = offloaded(tmp_path / "off")

    def refuse(files: Files, fd: int, path: Path) -> None:
        raise StorageError(5, "the device failed", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Files, "sync", refuse)
        with pytest.raises(StorageError, match="the device failed"):
            diskoffload.save_checkpoint(net, tmp_path / "a" / "b" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["off"]
    diskoffload.save_checkpoint(net, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").is_file()


def test_scratch_takes_the_folders_it_made_with_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    net = offloaded(tmp_path / "mine" / "a" / "b" / "off")
    other = offloaded(tmp_path / "mine" / "a" / "other")
    assert (tmp_path / "mine" / "a" / "b" / "off").is_dir()
    del net
    gc.collect()
    assert [path.name for path in (tmp_path / "mine" / "a").iterdir()] == ["other"]
    del other  # whose parent another had made
    gc.collect()
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["a"]


def test_folders_that_something_is_in_stay(tmp_path: Path) -> None:
    net = offloaded(tmp_path / "a" / "b" / "off")
    (tmp_path / "a" / "mine").touch()
    del net
    gc.collect()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    kept = offloaded(tmp_path / "c" / "off")
    with torch.no_grad():
        kept.scale.zero_()
    diskoffload.commit(kept)
    del kept
    gc.collect()
    assert (tmp_path / "c" / "off" / "diskoffload.journal").is_file()
