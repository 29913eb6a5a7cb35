"""The kernel tells what was written to, whoever wrote; in a forked child nobody is told."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diskoffload.store.buffers import Buffers
from diskoffload.system import write_watch as module
from diskoffload.system.memory import PAGE_BYTES, Memory, anonymous
from diskoffload.system.write_watch import Mark, WriteWatch, write_watch

MIB = 1 << 20


@pytest.fixture
def watch() -> WriteWatch:
    found = write_watch()
    if found is None:
        pytest.skip("this kernel does not tell what was written to (Linux 6.7 and userfaultfd)")
    return found


def filled(watch: WriteWatch, nbytes: int) -> Memory:
    memory = anonymous(nbytes)
    assert watch.watch(memory)
    memory.view()[:] = b"\1" * nbytes
    return memory


def mark_of(watch: WriteWatch, memory: Memory, offset: int = 0, nbytes: int = 0) -> Mark:
    mark = watch.mark(memory, offset, nbytes or memory.nbytes - offset)
    assert mark is not None
    return mark


def by_torch(memory: Memory) -> None:
    memory.tensor(torch.float32, (1024,), PAGE_BYTES).data.mul_(2)


def by_numpy(memory: Memory) -> None:
    tensor = memory.tensor(torch.uint8, (memory.nbytes,))
    array: np.ndarray = np.asarray(tensor)
    array[-1] = 7


def by_the_kernel(memory: Memory) -> None:
    with open("/dev/zero", "rb") as file:
        assert os.preadv(file.fileno(), [memory.view(5, 1)], 0) == 1


def with_what_is_there(memory: Memory) -> None:
    memory.view()[3] = 1


@pytest.mark.parametrize("nbytes", [PAGE_BYTES * 3, MIB, 16 * MIB, 16 * MIB + 3 * PAGE_BYTES + 5])
@pytest.mark.parametrize("write", [by_torch, by_numpy, by_the_kernel, with_what_is_there])
def test_any_write_is_told(watch: WriteWatch, nbytes: int, write: Callable[[Memory], None]) -> None:
    memory = filled(watch, nbytes)
    for _ in range(2):
        mark = mark_of(watch, memory)
        assert mark.was_written() is False
        assert memory.tensor(torch.uint8, (nbytes,)).sum() > 0  # to read is not to write
        assert mark.was_written() is False
        write(memory)
        assert mark.was_written() is True
        watch.open(memory)


def test_a_direct_read_into_it_is_told(watch: WriteWatch, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(PAGE_BYTES))
    memory = filled(watch, 16 * MIB)
    mark = mark_of(watch, memory)
    try:
        fd = os.open(tmp_path / "x", os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017 - tmpfs has no direct reads
        fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        assert os.preadv(fd, [memory.view(PAGE_BYTES, PAGE_BYTES)], 0) == PAGE_BYTES
    finally:
        os.close(fd)
    assert mark.was_written() is True


def test_the_pages_of_the_part_count_and_no_others(watch: WriteWatch) -> None:
    memory = filled(watch, 8 * PAGE_BYTES)
    part = mark_of(watch, memory, 2 * PAGE_BYTES + 100, 2 * PAGE_BYTES)  # it ends in the fifth
    for place in (0, 2 * PAGE_BYTES - 1, 5 * PAGE_BYTES):
        memory.view()[place] = 2
    assert part.was_written() is False
    memory.view()[5 * PAGE_BYTES - 1] = 2
    assert part.was_written() is True


def test_what_fills_an_opened_memory_is_not_told_after(watch: WriteWatch) -> None:
    memory = filled(watch, 4 * MIB)
    mark_of(watch, memory)
    watch.open(memory)
    memory.view()[:] = b"\2" * memory.nbytes
    assert mark_of(watch, memory).was_written() is False


def huge_bytes(memory: Memory) -> int:
    """Tell how much of a memory lies on huge pages."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            start, stop = (int(text, 16) for text in line.split(" ")[0].split("-"))
            here = memory.address <= start and stop <= memory.address + memory.nbytes
        elif here and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


def test_what_is_filled_again_stays_on_huge_pages(watch: WriteWatch) -> None:
    buffers, nbytes = Buffers(watch), 16 * MIB + 2 * PAGE_BYTES
    memory = buffers.take(nbytes)
    before = 0
    for _ in range(3):
        memory.view()[:] = b"\1" * memory.nbytes
        before = before or huge_bytes(memory)
        if not before:
            pytest.skip("no huge pages here")
        assert huge_bytes(memory) == before
        mark = mark_of(watch, memory, 0, nbytes)
        assert mark.was_written() is False
        buffers.give(memory)
        memory = buffers.take(nbytes)
        assert memory.address == mark.address


def test_the_memory_outlives_who_watched_it(watch: WriteWatch) -> None:
    memory = filled(watch, 4 * MIB)
    mark_of(watch, memory)
    tensor = memory.tensor(torch.uint8, (memory.nbytes,))
    del watch, memory
    gc.collect()
    tensor.fill_(3)
    assert int(tensor[-1]) == 3


def test_another_memory_of_the_system_is_not_marked(watch: WriteWatch) -> None:
    assert watch.mark(anonymous(MIB), 0, MIB) is None
    assert watch.was_written(anonymous(MIB).address, MIB) is None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_is_not_told_and_changes_nothing_for_its_parent(watch: WriteWatch) -> None:
    memory = filled(watch, 4 * MIB)
    mark = mark_of(watch, memory)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            other = anonymous(MIB)
            silent = mark.was_written() is None and not watch.watch(other)
            silent &= watch.mark(memory, 0, MIB) is None
            watch.open(memory)
            memory.view()[0] = 9
            own = write_watch()
            assert own is not None
            code = 0 if silent and mark_of(own, filled(own, MIB)).was_written() is False else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mark.was_written() is False
    memory.view()[0] = 9
    assert mark.was_written() is True


def test_its_descriptors_go_with_it(watch: WriteWatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    others = [write_watch() for _ in range(3)]
    marks = [mark_of(one, filled(one, MIB)) for one in others if one is not None]
    assert len(os.listdir("/proc/self/fd")) == before + 6
    del others
    assert len(os.listdir("/proc/self/fd")) == before + 6  # a mark asks
    del marks
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("answer", [False, None])
def test_a_kernel_that_tells_wrongly_is_not_asked(
    watch: WriteWatch, monkeypatch: pytest.MonkeyPatch, answer: bool | None
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(WriteWatch, "was_written", lambda *_: answer)
    assert write_watch() is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_of_an_unknown_machine_the_kernel_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "vax")
    assert write_watch() is None
