"""One offload folder has one owner: in this process, in others, and after a fork."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from shard_files import run_python, start_python

from diskoffload.errors import FolderInUseError, InvalidInputError, StorageError
from diskoffload.store.folder import Folder
from diskoffload.store.lock import LOCK_NAME, SHARD_PREFIX
from diskoffload.store.open_folders import open_folders
from diskoffload.store.writer import Ticket

pytestmark = pytest.mark.usefixtures("no_leaks")

KIB = 1 << 10


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Name a folder that is not there yet."""
    return tmp_path / "offload"


def names_in(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def shards_in(folder: Path) -> int:
    return sum(name.startswith(SHARD_PREFIX) for name in names_in(folder))


def put(folder: Folder, value: float = 1.0, name: str = "w") -> Ticket:
    return folder.put(name, torch.full((4 * KIB,), float(value)), None)


OWNER = """
import sys, time, torch
from diskoffload.store.folder import Folder

folder = Folder(sys.argv[1])
ticket = folder.put("x", torch.ones(5000), None)
folder.flush()
print("ready", flush=True)
time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(place: Path) -> None:
    process = start_python(OWNER, place)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            with pytest.raises(FolderInUseError, match=f"pid {process.pid}") as caught:
                Folder(place)
            assert caught.value.filename == str(place)
        assert shards_in(place) == 1
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    folder = Folder(place)
    assert (place / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert shards_in(place) == 0  # what the dead one left was never committed
    ticket = put(folder)
    folder.flush()
    assert shards_in(place) == 1
    del ticket, folder
    assert LOCK_NAME not in names_in(place)


FORK = """
import gc, os, sys, torch
from pathlib import Path
from diskoffload.errors import ClosedError
from diskoffload.store.folder import Folder
from diskoffload.store.open_folders import open_folders

def refused(call):
    try:
        call()
    except ClosedError as error:
        return "forked child" in str(error)
    return False

place = Path(sys.argv[1])
folder = open_folders.at(place)
done = folder.put("done", torch.full((3,), 5.0), None)
folder.flush()
waiting = folder.put("waiting", torch.full((3,), 6.0), None)
before = sorted(place.iterdir())
pid = os.fork()
if pid == 0:
    good = refused(lambda: folder.put("x", torch.zeros(3), None)) and refused(folder.flush)
    good = good and not folder.is_open and waiting.stored is None
    good = good and done.stored.load().tolist() == done.stored.mapped().tolist() == [5.0] * 3
    folder.close()
    del folder, done, waiting
    gc.collect()
    good = good and sorted(place.iterdir()) == before
    sys.exit(0 if good else 3)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("child", code)
print("same files", sorted(place.iterdir()) == before)
folder.flush()
print(done.stored.load().tolist(), waiting.stored.load().tolist())
"""


def test_a_forked_child_reads_and_neither_writes_nor_removes(place: Path) -> None:
    lines = run_python(FORK, place).splitlines()
    assert lines == ["child 0", "same files True", "[5.0, 5.0, 5.0] [6.0, 6.0, 6.0]"]
    assert not place.exists()


EXIT = """
import sys, threading, torch
from pathlib import Path
from diskoffload.store.folder import Folder
from diskoffload.store.open_folders import open_folders

place = Path(sys.argv[1])
held = open_folders.at(place / "a")
stored = [held.put("x", torch.ones(5000), None) for _ in range(50)]
held.flush()
mapped = stored[0].stored.mapped()
mapped.add_(1)
waiting = [held.put("y", torch.ones(5000), None) for _ in range(50)]
running = Folder(place / "b", group_bytes=1)
tickets = [running.put("z", torch.ones(300000), "zstd") for _ in range(2)]
running_one = Folder(None)
kept = [running_one.put("x", torch.ones(5), None)]
running_one.flush()
(place / "a" / "notes.txt").write_text("mine")
cycle = [held, running, running_one]
cycle.append(cycle)
if sys.argv[2] == "error":
    raise KeyError("the user's own")
"""


def test_the_interpreters_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    processes = {how: start_python(EXIT, tmp_path / how, how) for how in ("end", "error")}
    for how, process in processes.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (how == "error"), errors
        complaints = [line for line in errors.splitlines() if "offload" not in line]
        if how == "error":
            assert complaints[-1] == 'KeyError: "the user\'s own"'
            complaints = [line for line in complaints if "gnored" in line]
        assert complaints == []
    left = sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*"))
    kept = [f"{how}{rest}" for how in processes for rest in ("", "/a", "/a/notes.txt")]
    assert left == [*kept, "tmp"]


def test_one_path_is_one_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("HOME", str(place.parent))
    folder = open_folders.at(place)
    (place.parent / "link").symlink_to(place)
    for other in (place, str(place), "offload", "./x/../offload", "~/offload", "link", folder):
        assert open_folders.at(other) is folder
    assert open_folders.at(place.parent / "other") is not folder


def test_a_closed_or_gone_folder_is_opened_anew(place: Path) -> None:
    first = open_folders.at(place)
    first.close()
    number = id(first)
    del first
    second = open_folders.at(place)
    assert second.is_open
    ticket = put(second)
    second.flush()
    assert ticket.stored is not None
    del ticket, second, number
    assert not place.exists()


def test_threads_that_open_one_path_get_one_folder(place: Path) -> None:
    barrier, found = threading.Barrier(8), []

    def open_it() -> None:
        barrier.wait()
        found.append(open_folders.at(place))

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 8
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize("wrong", [5, b"bytes", ["list"], torch.zeros(1)])
def test_what_is_no_path_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidInputError, match="offload_dir must be a path"):
        open_folders.at(wrong)  # type: ignore[arg-type]


def test_a_path_that_is_a_file_is_refused_and_left(place: Path) -> None:
    place.write_text("mine")
    with pytest.raises(StorageError, match=str(place)):
        Folder(place)
    assert place.read_text() == "mine"


def test_a_lock_that_is_a_link_is_refused_and_its_target_left(place: Path) -> None:
    place.mkdir()
    (place.parent / "precious").write_text("mine")
    (place / LOCK_NAME).symlink_to(place.parent / "precious")
    with pytest.raises(StorageError, match="lock the folder"):
        Folder(place)
    assert (place.parent / "precious").read_text() == "mine"


def test_leaving_between_opening_and_locking_leaves_one_owner(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock's last owner removes the file after the next one opened it."""
    place.mkdir()
    flock = fcntl.flock
    left: list[Path] = []

    def late(fd: int, operation: int) -> None:
        if not left:
            left.append(place / LOCK_NAME)
            left[0].unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    folder = Folder(place)
    assert left
    with pytest.raises(FolderInUseError):
        Folder(place)
    del folder
    assert names_in(place) == []
