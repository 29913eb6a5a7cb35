"""Linux's own calls are made in one room only, and not at all where portable paths are taken."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diskoffload
from diskoffload.errors import StorageError
from diskoffload.store.shard import Shard
from diskoffload.system import files as files_module
from diskoffload.system import portable
from diskoffload.system.files import Files
from diskoffload.system.headroom import Headroom
from diskoffload.system.memory import (
    PAGE_BYTES,
    anonymous_bytes_of_process,
    discard_written,
    map_again,
    map_file,
    own_bytes_of_process,
    written_pages,
)
from diskoffload.system.portable import IS_LINUX, SWITCH

pytestmark = pytest.mark.usefixtures("no_leaks")

PACKAGE = Path(diskoffload.__file__).parent
MIB = 1 << 20

# ----------------------------------------------------------------------- where and whether

LINUXES = re.compile(
    "O_DIRECT|O_TMPFILE|POSIX_FADV_.*|posix_fadvise|posix_fallocate|copy_file_range|renameat2|"
    "sendfile|splice|memfd_create|sched_.*affinity|madvise|MADV_.*|malloc_trim|mincore|F_OFD_.*|"
    "/proc(/.*)?|/sys(/.*)?|_?IS_LINUX"
)


def linux_names(path: Path) -> list[str]:
    """List Linux's names in a module, but for what is only told in its docstrings."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        for name in (getattr(node, "attr", ""), getattr(node, "id", ""), literal(node)):
            if LINUXES.fullmatch(name):
                found.append(f"{path.relative_to(PACKAGE)}: {name}")
    return found


def literal(node: ast.AST) -> str:
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text else ""  # type: ignore[attr-defined]


def test_only_the_room_of_the_system_names_what_linux_has() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    outside = [one for one in modules if one.parent != PACKAGE / "system"]
    assert len(outside) > 50
    assert [name for one in outside for name in linux_names(one)] == []
    assert len([name for one in modules for name in linux_names(one)]) > 10


@pytest.mark.parametrize(
    ("platform", "value", "is_linux"),
    [
        ("linux", None, True),
        ("linux", "", True),
        ("linux", "0", True),
        ("linux", "1", False),
        ("linux", "yes", False),
        ("darwin", None, False),
        ("darwin", "0", False),
    ],
)
def test_the_switch_and_the_system_decide(
    monkeypatch: pytest.MonkeyPatch, platform: str, value: str | None, is_linux: bool
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    found = runpy.run_path(str(portable.__file__))
    assert found["IS_LINUX"] is is_linux
    assert (found["of_linux"](os, "getpid") is os.getpid) is is_linux
    assert found["of_linux"](os, "no_such_call") is None
    if is_linux:
        assert found["proc"]("self/maps") == "/proc/self/maps"
        return
    with pytest.raises(FileNotFoundError, match="portable paths"):
        found["proc"]("self/maps")


def test_what_the_system_tells_and_does(tmp_path: Path) -> None:
    """The same questions, whatever paths are taken; on portable ones no answer is Linux's."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE_BYTES))
    fd = Files().open_for_reading(path)
    try:
        memory = map_file(fd, 3 * PAGE_BYTES, "file")
        direct = Files().open_past_cache(path, fd)
        assert (written_pages(memory.address, PAGE_BYTES) is not None) is IS_LINUX
        assert discard_written(memory.address, PAGE_BYTES) is IS_LINUX
        assert discard_written(memory.address + 1, PAGE_BYTES)  # no whole page is in it
        if not IS_LINUX:
            assert direct is None
            assert not Files().exchange(tmp_path / "a", tmp_path / "b")
            assert Headroom().explain() == "machine"
        assert (own_bytes_of_process() > 0) is IS_LINUX
    finally:
        Files().close(fd)
    if direct is not None:
        Files().close(direct)


# ------------------------------------------------------- edits that were written elsewhere


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    torch.arange(2 * MIB).numpy().tofile(path)  # no two pages are the same
    return path


def test_a_range_that_is_mapped_again_reads_as_the_file(pages: Path) -> None:
    content = pages.read_bytes()
    fd = os.open(pages, os.O_RDONLY)
    try:
        memory = map_file(fd, len(content), "pages")
        memory.view()[:] = bytes(len(content))
        written_bytes = anonymous_bytes_of_process() or 0
        begin, stop = PAGE_BYTES + 100, 16 * MIB - PAGE_BYTES - 100
        map_again(memory, fd, memory.address + begin, stop - begin)
    finally:
        os.close(fd)
    if written_bytes:
        assert written_bytes - (anonymous_bytes_of_process() or 0) > 15 * MIB
    first, last = 2 * PAGE_BYTES, 16 * MIB - 2 * PAGE_BYTES
    expected = bytes(first) + content[first:last] + bytes(16 * MIB - last)
    assert bytes(memory.view()) == expected
    map_again(memory, -1, memory.address + 5, PAGE_BYTES)  # no whole page is in it
    with pytest.raises(StorageError, match=r"cannot map \d+ bytes anew"):
        map_again(memory, -1, memory.address, PAGE_BYTES)


def shard_with_an_edit(path: Path, *, rests: bool = True) -> tuple[Shard, torch.Tensor]:
    save_file({"a": torch.ones(MIB), "b": torch.ones(MIB)}, path)
    shard = Shard(path, Files())
    if rests:
        shard.rest()
    value = shard.mapped(shard.header.specs["a"])
    assert value is not None
    return shard, value.fill_(7)


@pytest.mark.parametrize("rests", [False, True], ids=["open", "at rest"])
@pytest.mark.parametrize("knows_how", [True, False], ids=["as here", "mapped anew"])
@pytest.mark.parametrize("what", ["there", "removed", "replaced", "changed"])
def test_memory_of_edits_goes_back_if_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_how: bool, what: str, rests: bool
) -> None:
    if not knows_how:
        monkeypatch.setattr("diskoffload.store.shard.discard_written", lambda *_: False)
    path = tmp_path / "some.safetensors"
    shard, value = shard_with_an_edit(path, rests=rests)
    if what == "removed":
        path.unlink()
    if what == "replaced":
        save_file({"a": torch.zeros(MIB), "b": torch.zeros(MIB)}, tmp_path / "other")
        (tmp_path / "other").rename(path)
    if what == "changed":
        os.utime(path)
    before_bytes = anonymous_bytes_of_process() or 0
    shard.forget_edits(value.data_ptr(), value.nbytes)
    given_bytes = before_bytes - (anonymous_bytes_of_process() or 0)
    is_there = what == "there" or (not rests and what != "changed")  # its descriptor is
    is_forgotten = is_there or (knows_how and IS_LINUX)
    middle = value[PAGE_BYTES:-PAGE_BYTES]
    assert set(middle.unique().tolist()) == {1.0 if is_forgotten else 7.0}
    if before_bytes:
        assert (given_bytes > 3 * MIB) is is_forgotten
    shard.forget_edits(value.data_ptr(), value.nbytes)


def test_a_value_is_compared_with_the_file_and_never_with_the_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diskoffload.store.shard._STEP_BYTES", MIB)
    path = tmp_path / "some.safetensors"
    shard, value = shard_with_an_edit(path)
    spec = shard.header.specs["a"]
    ones = memoryview(torch.ones(MIB).numpy()).cast("B")
    edited = memoryview(value.numpy()).cast("B")
    assert shard.has_bytes(spec, ones)
    assert not shard.has_bytes(spec, edited)
    value.fill_(1)
    assert shard.has_bytes(spec, edited)
    value[-1] = 2  # in the last part that is read
    assert not shard.has_bytes(spec, edited)
    path.unlink()
    with pytest.raises(StorageError):
        shard.has_bytes(spec, edited)


# ------------------------------------------------------------------------- other systems


@pytest.mark.parametrize("code", [0, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EIO])
def test_macos_is_asked_to_empty_the_devices_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked: list[tuple[str, Any]] = []

    def control(fd: int, command: int) -> int:
        asked.append(("full", command))
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(files_module, "_FULL_SYNC", 51)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append(("fsync", fd)))
    if code == errno.EIO:
        with pytest.raises(StorageError, match="sync the folder"):
            Files().sync_folder(tmp_path)
    else:
        Files().sync_folder(tmp_path)
    wanted = ["full", "fsync"] if code not in (0, errno.EIO) else ["full"]
    assert [one for one, _ in asked] == wanted
    assert asked[0][1] == 51


def test_no_call_moves_more_than_macos_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_CALL_STEP_BYTES", 7)
    sizes: list[int] = []

    def write(fd: int, data: memoryview, offset: int, real: Any = os.pwrite) -> int:
        sizes.append(len(data))
        return int(real(fd, data, offset))

    def read(fd: int, parts: list[memoryview], offset: int, real: Any = os.preadv) -> int:
        sizes.extend(map(len, parts))
        return int(real(fd, parts, offset))

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "preadv", read)
    path, content = tmp_path / "file", bytes(range(40))
    with Files().writing(path, new=True) as fd:
        Files().write(fd, memoryview(content), 0, path)
        target = bytearray(33)
        Files().read_into(fd, memoryview(target), 5, path)
    assert bytes(target) == content[5:38]
    assert path.read_bytes() == content
    assert (max(sizes), sum(sizes)) == (7, 73)
