"""File systems without mmap, where files are read, and without locks, where a file is one."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import (
    bare,
    check,
    check_committed,
    check_reopened,
    edit,
    in_child,
    limited,
    offloaded,
    tried,
    values,
)
from linux_only import linux_only
from safetensors.torch import save_file

import diskoffload
from diskoffload.errors import FolderInUseError, StorageError
from diskoffload.residency.held import State, held_of
from diskoffload.store.folder import Folder
from diskoffload.store.lock import LOCK_NAME
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files
from diskoffload.system.locking import _describe

TESTS = Path(__file__).parents[1]

# ---------------------------------------------------------------- no mmap


class Refusing(Files):
    """A file system that does not map."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code
        self.asked = 0

    def map(self, fd: int, nbytes: int, path: Path) -> Any:
        self.asked += 1
        raise StorageError(self.code, os.strerror(self.code), str(path))


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EACCES, errno.ENOMEM])
def test_a_model_works_where_nothing_can_be_mapped(
    tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    place, files = tmp_path / "off", Refusing(code)
    net = offloaded(place, files)
    before = values(net)
    assert diskoffload.commit(net).number == 1
    check(net, before)
    after = edit(net, 3)
    net.up._parameters.sync()
    assert held_of(net.up.weight).state is not State.BENEATH  # type: ignore[union-attr]
    check(net, after)
    assert diskoffload.commit(net).number == 2
    check_committed(place, after)
    del net
    gc.collect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "may_map", False)
        patch.setattr(Files, "__init__", lambda self: None)
        net = diskoffload.reopen(place, model=bare())
        check(net, after)
        after = edit(net, 5)
        diskoffload.commit(net)
    del net
    check_reopened(place, after)
    said = [one.getMessage() for one in caplog.records if "rather than mapped" in one.getMessage()]
    assert len([text for text in said if os.strerror(code) in text]) == 1
    assert str(place) in said[0]
    assert files.asked > 0


def test_a_refusal_is_asked_again_only_if_it_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    for code, seconds, times in (
        (errno.ENODEV, 0.0, 1),
        (errno.ENOMEM, 0.0, 3),
        (errno.ENOMEM, 100.0, 1),
    ):
        monkeypatch.setattr("diskoffload.store.shard._AGAIN_AFTER_SECONDS", seconds)
        files = Refusing(code)
        stored = stored_tensors(Shard(tmp_path / "a.safetensors", files))["a"]
        for _ in range(3):
            assert stored.mapped() is None
            assert torch.equal(stored.load(), torch.ones(9))
        assert files.asked == times


def test_a_limit_on_addresses(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.ones(5), "b": torch.zeros(64 << 20, dtype=torch.uint8)}, path)

    def work() -> list[object]:
        shard = Shard(path, Files())
        stored = stored_tensors(shard)["a"]
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with limited(resource.RLIMIT_AS, in_use + (32 << 20)):
            mapped = stored.mapped()
            loaded = stored.load().tolist()
            too_large = tried(stored_tensors(shard)["b"].load)
        shard._map_again_at = 0.0  # a second later
        return [mapped is None, loaded, too_large, stored.mapped() is not None]

    answer, ended_by = in_child(work)
    assert ended_by == 0
    assert isinstance(answer, list), answer
    none, loaded, too_large, again = answer
    assert none
    assert loaded == [1.0] * 5
    assert again
    assert too_large.startswith("StorageError: [Errno 12]")
    assert "ulimit -v" in too_large


def test_shards_at_rest_that_are_not_mapped_hold_no_descriptor(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "off", files=Files(may_map=False))
    ticket = folder.put("w", torch.arange(9.0), None)
    folder.flush()
    stored = ticket.stored
    assert stored is not None
    paths = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    assert str(stored.shards[0].path) not in paths
    twin = stored.over(lambda shard: shard.twin())
    for one in (stored, twin):
        assert one.mapped() is None
        assert torch.equal(one.load(), torch.arange(9.0))
    stored.shards[0].path.unlink()
    assert not stored.shards[0].is_gone()  # no mapping has it: it is lost, and named
    with pytest.raises(StorageError, match="No such file"):
        stored.load()


# Tests that need mappings: what a mapped read does not notice, when it lets a file go, what of one
# is compared at a commit, and what is still there when somebody has removed it.
ABOUT_MAPPINGS = [
    "test_commit_blind",
    "test_a_wrong_byte_of_data_is_named",
    "test_a_mapped_tensor_is_not_compacted_away",
    "test_compacting_a_folder_at_rest",
    "test_a_lost_file_is_written_anew",
]


@pytest.mark.long
@pytest.mark.parametrize(
    "what", ["contracts/test_module_contract.py", "contracts/test_ties.py", "commits"]
)
def test_what_is_promised_holds_without_mmap(tmp_path: Path, what: str) -> None:
    """Run other tests where nothing can be mapped, but for those that look at mappings."""
    (tmp_path / "without_mmap.py").write_text(
        "from diskoffload.system.files import Files\n"
        "Files.may_map = False\n"
        "Files.__init__ = lambda self, *, may_map=False: None\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "without_mmap"]
    command += ["--basetemp", str(tmp_path / "inner"), str(TESTS / what)]
    done = subprocess.run(
        [*command, "-k", " and ".join(f"not {name}" for name in ABOUT_MAPPINGS)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{TESTS.parent}"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


# ---------------------------------------------------------------- no locks


def refuse_locks(patch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    patch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch, errno.ENOLCK)


knows_processes = linux_only("that a pid lives is known, not whether it is the same process")


def claims_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_folder_has_one_owner_without_locks(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch, code)
    place = tmp_path / "off"
    net = offloaded(place)
    assert f"has no locks ({os.strerror(code)})" in caplog.text
    for _ in range(2):
        with pytest.raises(FolderInUseError, match=f"pid {os.getpid()} on") as caught:
            Folder(place)
        assert caught.value.filename == str(place)
    diskoffload.commit(net)
    after = edit(net, 3)
    diskoffload.commit(net)
    del net, caught
    check_reopened(place, after)
    assert not (place / LOCK_NAME).exists()


@pytest.mark.usefixtures("no_locks")
def test_a_lock_that_is_closed_but_not_removed_is_free(tmp_path: Path) -> None:
    files, path = Files(), tmp_path / LOCK_NAME
    for _ in range(2):
        fd = files.lock(path)
        with pytest.raises(FolderInUseError):
            files.lock(path)
        files.close(fd)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    files.close(other)  # a number that was a lock's before
    assert (tmp_path / "other").read_bytes() == b""


@knows_processes
@pytest.mark.usefixtures("no_locks")
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        Files().lock(path)
        os.write(writer, b"ready")
        signal.pause()
    try:
        assert os.read(reader, 9) == b"ready"
        with pytest.raises(FolderInUseError, match=f"pid {pid} on .*wait for it to end"):
            Folder(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    folder = Folder(tmp_path)  # though it is a zombie, whom nobody has waited for
    os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    assert [claim["pid"] for claim in claims_in(path)] == [pid, os.getpid()]
    with pytest.raises(FolderInUseError, match=f"pid {os.getpid()}"):
        Folder(tmp_path)
    assert folder.is_open


OF_THE_DEAD = ("its pid is another's", "before a reboot", "in a container before a reboot")
CLAIMS = {
    "alive": ({}, r"wait for it to end"),
    "its pid is another's": ({"started": "1"}, None),
    "before a reboot": ({"boot": "before"}, None),
    "in a container before a reboot": ({"boot": "before", "space": "pid:[1]"}, None),
    "of who does not say when it began": ({"boot": "", "started": ""}, r"wait for it to end"),
    "of who says nothing of itself": (
        {"boot": "", "started": "", "space": ""},
        r"wait for it to end|cannot be seen",
    ),
    "no such process": ({"pid": 2**22 + 1}, None),
    "of another host": (
        {"host": "elsewhere"},
        r"on elsewhere\).* no locks.*remove diskoffload",
    ),
    "of a container": ({"space": "pid:[1]"}, r"cannot be seen.*remove diskoffload\.lock"),
}


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "which",
    [pytest.param(one, marks=knows_processes) if one in OF_THE_DEAD else one for one in CLAIMS],
)
def test_whose_claim_counts(tmp_path: Path, which: str) -> None:
    path = tmp_path / LOCK_NAME
    change, refusal = CLAIMS[which]
    claim = {**_describe(os.getpid()), "token": "t", **change}
    path.write_text("{cut off\n" + json.dumps(claim) + "\n")
    if refusal is None:
        folder = Folder(tmp_path)
        assert claims_in(path)[-1]["token"] != "t"
        assert folder.is_open
        return
    text = path.read_text()
    with pytest.raises(FolderInUseError, match=refusal):
        Folder(tmp_path)
    assert path.read_text() == text


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "left", ["nothing", "an empty file", pytest.param("a dead claim", marks=knows_processes)]
)
def test_of_many_that_want_a_lock_one_gets_it(tmp_path: Path, left: str) -> None:
    path, ready, done = tmp_path / LOCK_NAME, os.pipe(), os.pipe()
    if left != "nothing":
        dead = json.dumps({**_describe(os.getpid()), "token": "t", "started": "1"})
        path.write_text("" if left == "an empty file" else f"{dead}\n")
    children = []
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            os.close(ready[1])
            os.read(ready[0], 1)  # until all are there
            answer = tried(lambda: Files().lock(path))
            os.write(done[1], b"1" if answer == "ok" else b"0")
            signal.pause()  # who has it keeps it
        children.append(pid)
    os.close(ready[1])
    answers = b""
    while len(answers) < len(children):
        answers += os.read(done[0], 99)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for fd in (ready[0], *done):
        os.close(fd)
    assert answers.count(b"1") == 1, answers
