"""Files as the system gives them: every refusal has a name."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from linux_only import linux_only

from diskoffload.errors import (
    CheckpointError,
    FolderInUseError,
    NoSpaceError,
    OffloadError,
    StorageError,
)
from diskoffload.system.files import Files, free_bytes, memory_file_system, naming_faults

pytestmark = pytest.mark.usefixtures("no_leaks")

names_file_systems = linux_only("nobody says which file system is in memory")

FILES = Files()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = FILES.open_for_writing(path)
    yield fd, path
    FILES.close(fd)


# ------------------------------------------------------------------------ naming faults


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EIO, StorageError),
        (errno.EACCES, StorageError),
        (errno.EROFS, StorageError),
        (errno.ENOENT, StorageError),
        (errno.EMFILE, StorageError),
        (errno.EFBIG, StorageError),
    ],
)
def test_the_systems_refusals_become_ours(code: int, kind: type[StorageError]) -> None:
    with pytest.raises(StorageError) as caught, naming_faults("do a thing", Path("/some/place")):
        raise OSError(code, os.strerror(code))
    error = caught.value
    assert type(error) is kind
    assert (error.errno, error.filename) == (code, "/some/place")
    assert os.strerror(code) in str(error)
    assert "could not do a thing" in str(error)
    assert "/some/place" in str(error)
    assert isinstance(error, (OSError, OffloadError))
    assert isinstance(error.__cause__, OSError)


def test_our_own_errors_and_others_pass() -> None:
    for error in (CheckpointError("x"), ValueError("y"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, naming_faults("do a thing", "there"):
            raise error
        assert caught.value is error


def test_an_error_without_a_number_is_named_too() -> None:
    with (
        pytest.raises(StorageError, match="could not do a thing: odd"),
        naming_faults("do a thing", "there"),
    ):
        raise OSError("odd")


# --------------------------------------------------------------------- reading, writing


def test_bytes_are_written_and_read_at_their_place(opened: tuple[int, Path]) -> None:
    fd, path = opened
    FILES.write(fd, memoryview(b"AB"), 4, path)
    FILES.set_size(fd, 12, path)
    assert FILES.size_bytes(fd, path) == 12
    FILES.sync(fd, path)
    FILES.sync_folder(path.parent)
    target = bytearray(6)
    FILES.read_into(fd, memoryview(target), 3, path)
    assert target == b"3AB678"
    assert path.read_bytes() == b"0123AB6789\0\0"
    FILES.read_into(fd, memoryview(bytearray()), 100, path)


def test_reading_beyond_the_end_says_how_far_it_came(opened: tuple[int, Path]) -> None:
    fd, path = opened
    with pytest.raises(StorageError, match=r"8 bytes at offset 6: the file ends after 4") as caught:
        FILES.read_into(fd, memoryview(bytearray(8)), 6, path)
    assert caught.value.filename == str(path)


def test_a_duplicate_reads_what_is_gone_by_name(opened: tuple[int, Path]) -> None:
    fd, path = opened
    path.unlink()
    other = FILES.duplicate(fd, path)
    try:
        target = bytearray(10)
        FILES.read_into(other, memoryview(target), 0, path)
        assert target == b"0123456789"
        assert not os.get_inheritable(other)
    finally:
        FILES.close(other)


def test_a_file_is_created_only_where_none_is(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        FILES.close(FILES.create(tmp_path / "new"))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    with pytest.raises(StorageError, match="create the file") as caught:
        FILES.create(tmp_path / "new")
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize("method", ["open_for_reading", "open_for_writing"])
def test_a_file_that_is_not_there_is_not_made(tmp_path: Path, method: str) -> None:
    with pytest.raises(StorageError, match="none") as caught:
        getattr(FILES, method)(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- names, folders


def test_two_folders_are_exchanged(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "sécond"
    first.mkdir()
    second.mkdir()
    (first / "a").write_text("1")
    (second / "b").write_text("2")
    if not FILES.exchange(first, second):
        pytest.skip("this system cannot exchange two names")
    assert [one.name for one in first.iterdir()] == ["b"]
    assert [one.name for one in second.iterdir()] == ["a"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["first", "sécond"]


def test_an_exchange_with_nothing_is_told_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("1")
    assert FILES.exchange(tmp_path / "first", tmp_path / "none") is False
    assert [one.name for one in tmp_path.iterdir()] == ["first"]


def test_renaming_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    FILES.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"
    with pytest.raises(StorageError, match="rename a to b"):
        FILES.rename(tmp_path / "a", tmp_path / "b")


def test_removing_twice_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    FILES.remove(tmp_path / "a")
    FILES.remove(tmp_path / "a")
    with pytest.raises(StorageError, match="remove the file"):
        FILES.remove(tmp_path)


def test_folders_are_made_and_removed_only_when_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert FILES.make_folder(folder) == (folder, folder.parent)
    assert FILES.make_folder(folder) == ()
    (folder / "mine").write_text("1")
    FILES.remove_folder_if_empty(folder)
    assert (folder / "mine").exists()
    (folder / "mine").unlink()
    FILES.remove_folder_if_empty(folder)
    FILES.remove_folder_if_empty(folder)
    assert not folder.exists()
    FILES.remove_folders_if_empty((folder, folder.parent))
    assert not folder.parent.exists()
    (tmp_path / "file").write_text("1")
    with pytest.raises(StorageError):
        FILES.make_folder(tmp_path / "file")
    with pytest.raises(StorageError):
        FILES.remove_folder_if_empty(tmp_path / "file")


# ---------------------------------------------------------------------------- locking


def test_a_lock_is_ours_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("99999999\nand more\n")
    first = FILES.lock(path)
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(FolderInUseError, match=f"pid {os.getpid()}") as caught:
        FILES.lock(path)
    assert caught.value.errno == errno.EAGAIN
    assert caught.value.filename == str(tmp_path)
    assert path.read_text() == f"{os.getpid()}\n"
    FILES.close(first)
    FILES.close(FILES.lock(path))


def test_a_lock_nobody_can_make_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lock the folder"):
        FILES.lock(tmp_path / "none" / "lock")


# ----------------------------------------------------------------------- file systems


def test_free_bytes_of_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    for path in (tmp_path, tmp_path / "a" / "b" / "c"):
        assert abs(free_bytes(path) - free) < 1 << 30
    assert free_bytes(Path("not/there/at/all")) > 0


def test_free_bytes_are_those_of_the_file_system_that_is_asked(small_disk: Path) -> None:
    (small_disk / "half").write_bytes(bytes(512 << 10))
    assert free_bytes(small_disk) == free_bytes(small_disk / "a" / "b") == 512 << 10


@names_file_systems
@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no RAM file system is at hand")
def test_a_file_system_in_memory_is_named(tmp_path: Path) -> None:
    assert memory_file_system(Path("/dev/shm")) == "tmpfs"
    assert memory_file_system(Path("/dev/shm/a/b/c")) == "tmpfs"
    (tmp_path / "link").symlink_to("/dev/shm")
    assert memory_file_system(tmp_path / "link" / "not there") == "tmpfs"
    assert memory_file_system(Path("/proc")) is None


@names_file_systems
@pytest.mark.parametrize("name", ["with space", "with\\slash", "数据", "tab\tand\nline", "é"])
def test_mount_points_of_any_name(small_disk: Path, name: str) -> None:
    around = small_disk.parent / "around"
    place = around / name
    place.mkdir(parents=True)
    before = memory_file_system(around / "beside")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False
    )
    assert mounted.returncode == 0, mounted.stderr
    try:
        assert memory_file_system(place / "inside") == "tmpfs"
        assert memory_file_system(around / "beside") == before
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
