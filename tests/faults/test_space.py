"""No room: on the disk, in a quota, under a limit; at opening, in a tensor, at a commit."""

from __future__ import annotations

import errno
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_cases import (
    KIB,
    Failing,
    check,
    check_committed,
    check_reopened,
    edit,
    limited,
    offloaded,
    values,
)

import diskoffload
from diskoffload.errors import NoSpaceError, StorageError
from diskoffload.store.folder import Folder
from diskoffload.system.files import Files, free_bytes


def fill(place: Path, left_bytes: int = 0) -> Path:
    ballast = place / "ballast"
    ballast.write_bytes(bytes(free_bytes(place) - left_bytes))
    return ballast


def test_a_group_that_cannot_fit_is_refused_before_it_is_begun(
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted("size=1m")
    folder = Folder(disk / "off")
    ballast = fill(disk, 100 * KIB)
    value = torch.arange(64 * KIB, dtype=torch.float32)
    ticket = folder.put("w", value, None)
    for _ in range(2):
        with pytest.raises(NoSpaceError) as caught:
            folder.flush()
        assert "cannot write 262400 bytes" in str(caught.value)
        assert "160000 are missing" in str(caught.value)
        assert caught.value.filename == str(disk / "off")
    assert [path.name for path in (disk / "off").iterdir()] == ["diskoffload.lock"]
    ballast.unlink()
    folder.flush()
    assert ticket.stored is not None
    assert torch.equal(ticket.stored.load(), value)


class FillsUp(Files):
    """Another process takes all the room once the first half of a tensor is written."""

    disk: Path | None = None

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        if self.disk is None or len(data) < 64 * KIB:
            super().write(fd, data, offset, path)
            return
        super().write(fd, data[: len(data) // 2], offset, path)
        fill(self.disk)
        super().write(fd, data[len(data) // 2 :], offset + len(data) // 2, path)


def test_a_disk_that_is_full_in_the_middle_of_a_tensor(mounted: Callable[[str], Path]) -> None:
    disk, files = mounted("size=3m"), FillsUp()
    net = offloaded(disk / "off", files)
    before = values(net)
    diskoffload.commit(net)
    files.disk = disk
    after = edit(net, 3)
    with pytest.raises(NoSpaceError, match=r"could not write the file.*free some space"):
        diskoffload.commit(net)
    check(net, after)
    check_committed(disk / "off", before)
    assert not list((disk / "off").glob("*.partial"))
    files.disk = None
    (disk / "ballast").unlink()
    assert diskoffload.commit(net).number == 2
    check_committed(disk / "off", after)
    del net
    check_reopened(disk / "off", after)


def test_a_disk_that_is_full_at_the_commit(mounted: Callable[[str], Path]) -> None:
    disk = mounted("size=3m")
    net = offloaded(disk / "off")
    before = values(net)
    diskoffload.commit(net)
    after = edit(net, 5)
    net.up._parameters.sync()
    net._buffers.sync()
    note = {"done": "x" * (8 * KIB)}  # more than what is left of the journal's last page
    ballast = fill(disk)
    for _ in range(2):
        with pytest.raises(NoSpaceError, match="free some space"):
            diskoffload.commit(net, note=note)
        check(net, after)
        check_committed(disk / "off", before)
    ballast.unlink()
    assert diskoffload.commit(net, note=note).number == 2
    del net
    check_reopened(disk / "off", after)


def test_a_folder_on_a_full_disk_opens_and_gives_what_was_committed(
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted("size=3m")
    net = offloaded(disk / "off")
    expected = values(net)
    diskoffload.commit(net)
    del net
    gc.collect()
    fill(disk)
    check_reopened(disk / "off", expected)


def test_no_room_for_another_file_at_opening(mounted: Callable[[str], Path]) -> None:
    disk = mounted("nr_inodes=3")  # the root, the folder, one more
    (disk / "other").touch()
    for _ in range(2):
        with pytest.raises(NoSpaceError, match=r"could not lock the folder.*free some space"):
            Folder(disk / "off")
    assert [path.name for path in disk.iterdir()] == ["other"]  # nothing half made is left
    (disk / "other").unlink()
    folder = Folder(disk / "off")
    assert folder.is_open


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    place = tmp_path / "off"
    net = offloaded(place)
    before = values(net)
    diskoffload.commit(net)
    after = edit(net, 7)
    with limited(resource.RLIMIT_FSIZE, 96 * KIB), pytest.raises(StorageError) as caught:
        diskoffload.commit(net)
    assert caught.value.errno == errno.EFBIG
    assert "ulimit -f" in str(caught.value)
    check(net, after)
    check_committed(place, before)
    assert diskoffload.commit(net).number == 2
    del net
    check_reopened(place, after)


@pytest.mark.parametrize("what", ["create", "write", "set_size", "sync", "sync_folder"])
def test_a_quota_that_is_used_up(tmp_path: Path, what: str) -> None:
    place, files = tmp_path / "off", Failing(errno.EDQUOT)
    net = offloaded(place, files)
    before = values(net)
    diskoffload.commit(net)
    after = edit(net, 7)
    files.failing = {what}
    for _ in range(2):
        with pytest.raises(NoSpaceError, match="quota is used up"):
            diskoffload.commit(net)
    check(net, after)
    check_committed(place, before)
    files.failing = set()
    assert diskoffload.commit(net).number == 2
    check_committed(place, after)
    del net
    check_reopened(place, after)
