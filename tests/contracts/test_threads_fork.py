"""A forked child reads, whatever the parent was doing; it writes and removes nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from threaded import CHILD_SECONDS, GatedFiles, Shelf, in_a_child, value_of, work_together

import diskoffload
from diskoffload.residency.resident import Residency
from diskoffload.store.folder import Folder

WAYS: dict[str, dict[str, Any]] = {
    "disk": {},
    "zstd": {"compression": "zstd"},
    "elsewhere": {"onload_device": "cpu:0"},
}

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture(params=WAYS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(WAYS[request.param])


def files_of(shelf: Shelf) -> set[str]:
    return {path.name for path in shelf.module._parameters.offload_dir.iterdir()}


def test_a_child_reads_while_the_writer_has_work(options: dict[str, Any], tmp_path: Path) -> None:
    files = GatedFiles()
    # A group is written when three entries wait and another comes.
    group_bytes = 3 * value_of(0, 0).nbytes
    shelf = Shelf(Folder(tmp_path / "off", files=files, group_bytes=group_bytes), **options)
    shelf.sync()
    with files.shut():
        for entry, how in enumerate(("update", "assign", "update")):
            shelf.change(entry, how)
        shelf.change(3, "assign")  # this one waits for its turn
        assert files.arrived.wait(CHILD_SECONDS)
        in_a_child(shelf.read_all)
    shelf.read_all()
    shelf.sync()
    shelf.read_all()


def test_a_childs_end_removes_nothing_of_the_parents(
    options: dict[str, Any], tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path / "off", **options)
    shelf.sync()
    before = files_of(shelf)
    kept = [shelf]

    def drop_all() -> None:
        kept.clear()
        gc.unfreeze()
        gc.collect()

    del shelf
    in_a_child(drop_all)
    assert files_of(kept[0]) == before
    kept[0].read_all()


def test_a_child_that_exits_as_programs_do_removes_nothing(tmp_path: Path) -> None:
    script = f"""
        import os, sys, torch, diskoffload
        from safetensors.torch import save_file
        module = torch.nn.Linear(64, 64)
        value = module.weight.detach().clone()
        diskoffload.offload_module(module, "cpu", "disk", offload_dir={str(tmp_path / "off")!r})
        module._parameters.sync()
        diskoffload.update_offload_parameter(module, "weight", value + 1)
        before = sorted(os.listdir({str(tmp_path / "off")!r}))
        pid = os.fork()
        if not pid:
            assert torch.equal(module.weight, value + 1)
            sys.exit(7)  # its finalizers and atexit handlers run
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert sorted(os.listdir({str(tmp_path / "off")!r})) == before
        module._parameters.sync()
        assert torch.equal(module.weight, value + 1)
        print("fine")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(diskoffload.__file__).parents[1],
    )
    assert done.stdout == "fine\n", done.stderr
    assert not (tmp_path / "off").exists()


def test_a_childs_assignment_is_refused_and_changes_nothing(
    options: dict[str, Any], tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path / "off", **options)
    shelf.sync()

    def assign() -> None:
        for _ in range(2):
            with pytest.raises(diskoffload.ClosedError, match="forked child can only read"):
                shelf.module.e0 = torch.nn.Parameter(value_of(0, 1))
            with pytest.raises(diskoffload.ClosedError, match="forked child can only read"):
                shelf.module.register_buffer("new", torch.ones(3))
            assert not hasattr(shelf.module, "new")
            shelf.read_all()
        with pytest.raises(diskoffload.ClosedError, match="forked child can only read"):
            diskoffload.update_offload_parameter(shelf.module, "e0", value_of(0, 1))

    in_a_child(assign)
    shelf.read_all()
    shelf.change(0, "assign")
    shelf.read_all()


@pytest.mark.parametrize(
    "way",
    [
        "disk",
        "zstd",
        "elsewhere",
    ],
)
@torch.no_grad()
def test_a_childs_edit_is_its_own_and_stays(way: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "off", **WAYS[way])
    shelf.sync()

    def edit() -> None:
        shelf.module.e0.fill_(5)
        for _ in range(2):
            for entry in range(1, len(shelf.begun)):  # reading others asks for room
                shelf.read(entry)
            assert (shelf.module.e0 == 5).all()

    in_a_child(edit)
    shelf.read_all()


def test_a_fork_while_another_thread_is_in_the_middle_of_something(tmp_path: Path) -> None:
    """As a DataLoader forks its workers while another thread works with the model."""
    files = GatedFiles()
    shelf = Shelf(Folder(tmp_path / "off", files=files), residency=Residency(), compression="zstd")
    shelf.sync()
    shelf.evict()
    shelf.change(0, "edit")
    syncing = threading.Thread(target=shelf.sync)
    opening = threading.Timer(1.0, files.gate.set)
    with files.shut():
        syncing.start()
        assert files.arrived.wait(CHILD_SECONDS)
        opening.start()  # a fork may wait until what others do is done
        try:
            in_a_child(shelf.read_all, 5.0)
        finally:
            opening.join()
            syncing.join()
    shelf.read_all()


@pytest.mark.slow
def test_forks_while_other_threads_read_change_and_evict(
    options: dict[str, Any], tmp_path: Path
) -> None:
    shelf = Shelf(Folder(tmp_path / "off", group_bytes=64 << 10), **options)

    def change() -> None:
        for entry in range(len(shelf.begun)):
            shelf.change(entry, "assign")

    work_together(
        30.0,
        change,
        shelf.evict,
        shelf.sync,
        shelf.read_all,
        lambda: in_a_child(shelf.read_all),
    )
