"""Memory of the system: seen when it was written to, and given back when it is not used."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from linux_only import linux_only
from page_cache import cached_pages
from shard_files import in_child, mappings_of, noise, same

from diskoffload.errors import StorageError
from diskoffload.system import memory as memory_module
from diskoffload.system.memory import (
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    Memory,
    anonymous,
    anonymous_bytes_of_process,
    discard_written,
    empty,
    map_file,
    populate,
    tensor_bytes,
    written_pages,
)
from diskoffload.system.portable import IS_LINUX

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(sys.platform != "linux", reason="the kernel's accounts are Linux's"),
]

needs_pagemap = linux_only("nobody says which pages were written")

MIB = 1 << 20
PAGES = 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "pages"
    made.write_bytes(bytes(range(256)) * (PAGES * PAGE_BYTES // 256))
    return made


def map_path(path: Path) -> Memory:
    fd = os.open(path, os.O_RDONLY)
    try:
        return map_file(fd, path.stat().st_size, str(path))
    finally:
        os.close(fd)


def written(memory: Memory, offset: int = 0, nbytes: int | None = None) -> list[int]:
    """List the numbers of the written pages, counted from the memory's first."""
    runs = written_pages(memory.address + offset, nbytes or memory.nbytes - offset)
    assert runs is not None
    pages = []
    for start, stop in runs:
        assert start % PAGE_BYTES == stop % PAGE_BYTES == 0
        first = (start - memory.address) // PAGE_BYTES
        pages += range(first, first + (stop - start) // PAGE_BYTES)
    return pages


def as_tensor(memory: Memory, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return memory.tensor(dtype, (memory.nbytes // dtype.itemsize,))


# ---------------------------------------------------------------------------- edits


@needs_pagemap
def test_clean_pages_are_not_reported(path: Path) -> None:
    memory = map_path(path)
    assert written(memory) == []
    assert int(as_tensor(memory, torch.uint8).sum()) > 0  # now they are present
    assert written(memory) == []


def in_place(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def through_data(tensor: torch.Tensor) -> None:
    tensor.data.zero_()


def through_numpy(tensor: torch.Tensor) -> None:
    tensor.numpy()[0] = 1


def through_detach(tensor: torch.Tensor) -> None:
    tensor.detach()[0] = 1


def through_pointer(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 0x11, 4)


def through_init(tensor: torch.Tensor) -> None:
    torch.nn.init.ones_(torch.nn.Parameter(tensor))


def with_the_same_value(tensor: torch.Tensor) -> None:
    tensor.copy_(tensor.clone())


@needs_pagemap
@pytest.mark.parametrize(
    "edit",
    [
        in_place,
        through_data,
        through_numpy,
        through_detach,
        through_pointer,
        through_init,
        with_the_same_value,
    ],
)
def test_edits_are_seen_whatever_made_them(
    path: Path, edit: Callable[[torch.Tensor], None]
) -> None:
    before = path.read_bytes()
    memory = map_path(path)
    tensor = memory.tensor(torch.float32, (10,), 5 * PAGE_BYTES + 64)
    edit(tensor)
    assert written(memory) == [5]
    assert path.read_bytes() == before


@needs_pagemap
def test_runs_of_pages_are_joined(path: Path) -> None:
    memory = map_path(path)
    view = memory.view()
    for page in (0, 3, 4, 5, 9, PAGES - 1):
        view[page * PAGE_BYTES + 7] = 1
    runs = written_pages(memory.address, memory.nbytes)
    assert runs is not None
    offsets = [(start - memory.address, stop - memory.address) for start, stop in runs]
    wanted = [(0, 1), (3, 6), (9, 10), (PAGES - 1, PAGES)]
    assert offsets == [(start * PAGE_BYTES, stop * PAGE_BYTES) for start, stop in wanted]


@needs_pagemap
def test_ranges_that_begin_and_end_inside_a_page(path: Path) -> None:
    memory = map_path(path)
    memory.view()[2 * PAGE_BYTES] = 1
    memory.view()[4 * PAGE_BYTES - 1] = 1
    assert written(memory, 2 * PAGE_BYTES + 100, 50) == [2]  # the page, not the bytes
    assert written(memory, 2 * PAGE_BYTES - 1, 1) == []
    assert written(memory, 2 * PAGE_BYTES - 1, 2) == [2]
    assert written(memory, 2 * PAGE_BYTES + 5, 2 * PAGE_BYTES) == [2, 3]
    assert written(memory, 4 * PAGE_BYTES, 1) == []


@needs_pagemap
def test_an_edit_in_another_mapping_is_not_ours(path: Path) -> None:
    ours, others = map_path(path), map_path(path)
    as_tensor(others).zero_()
    assert written(ours) == []
    assert len(written(others)) == PAGES


@needs_pagemap
def test_more_pages_than_are_read_at_once(tmp_path: Path) -> None:
    huge = tmp_path / "sparse"
    pages = (1 << 16) + 5
    with open(huge, "wb") as file:
        file.truncate(pages * PAGE_BYTES)
    memory = map_path(huge)
    for page in ((1 << 16) - 1, 1 << 16, pages - 1):
        memory.view()[page * PAGE_BYTES] = 1
    assert written(memory) == [(1 << 16) - 1, 1 << 16, pages - 1]


@needs_pagemap
def test_nobody_need_look_at_the_answer(path: Path) -> None:
    memory = map_path(path)
    as_tensor(memory).zero_()
    before = len(os.listdir("/proc/self/fd"))
    kept = [written_pages(memory.address, memory.nbytes) for _ in range(5)]
    begun = written_pages(memory.address, memory.nbytes)
    assert begun is not None
    assert next(begun)[0] == memory.address
    begun.close()  # type: ignore[attr-defined]
    assert len(kept) == 5
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_the_kernel_does_not_say_neither_do_we(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("it takes root to become another user")
    memory = map_path(path)

    def ask_twice() -> list[bool]:
        first = written_pages(memory.address, PAGE_BYTES) is None
        os.setuid(65534)
        return [first, written_pages(memory.address, PAGE_BYTES) is None]

    assert in_child(ask_twice) == [not IS_LINUX, True]


# ------------------------------------------------------------------------- file mappings


def test_tensors_of_a_mapping_lie_where_they_should(path: Path) -> None:
    memory = map_path(path)
    tensor = memory.tensor(torch.int16, (2, 3), 512)
    assert tensor.data_ptr() == memory.address + 512
    assert bytes(tensor_bytes(tensor)) == path.read_bytes()[512:524]
    assert tensor.untyped_storage().nbytes() == 12
    assert bytes(memory.view(512, 12)) == path.read_bytes()[512:524]
    assert len(memory.view(512)) == memory.nbytes - 512
    assert memory.tensor(torch.float32, (0, 5), 0).shape == (0, 5)


def test_a_mapping_goes_with_its_last_user(path: Path) -> None:
    memory = map_path(path)
    tensor, view = memory.tensor(torch.uint8, (5,), 3), memory.view(0, 4)
    del memory
    assert mappings_of(path) == 1
    assert tensor.tolist() == [3, 4, 5, 6, 7]
    del tensor
    assert mappings_of(path) == 1
    assert bytes(view) == bytes(range(4))
    del view
    assert mappings_of(path) == 0


@linux_only("without MAP_NORESERVE it is refused, and read instead")
def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    memory = map_path(tmp_path / "sparse")
    memory.view()[-1] = 5
    assert memory.view()[-1] == 5


def test_a_refused_mapping_is_named(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match=r"cannot map some\.safetensors .*max_map_count"):
            map_file(fd, 1 << 60, "some.safetensors")
    finally:
        os.close(fd)
    with pytest.raises(StorageError, match=r"cannot map x .*check that the file system"):
        map_file(fd, 4096, "x")  # a closed descriptor


def test_many_mappings_cost_no_objects(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    for _ in range(20):
        map_file(fd, 4096, "x").tensor(torch.uint8, (4,))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(500):
        map_file(fd, 4096, "x").tensor(torch.uint8, (4,))
    gc.collect()
    os.close(fd)
    assert len(gc.get_objects()) < before + 100
    assert mappings_of(path) == 0


# --------------------------------------------------------------------- anonymous memory


def anonymous_bytes() -> int:
    found = anonymous_bytes_of_process()
    assert found is not None
    return found


def test_anonymous_memory_goes_back_to_the_system() -> None:
    before = anonymous_bytes()
    memory = anonymous(64 * MIB)
    assert anonymous_bytes() - before < 8 * MIB  # nothing until it is touched
    assert int(as_tensor(memory).sum()) == 0
    as_tensor(memory).fill_(1)
    assert anonymous_bytes() - before > 60 * MIB
    del memory
    assert anonymous_bytes() - before < 4 * MIB


def test_large_memory_takes_no_more_than_is_touched_but_for_pages() -> None:
    """No huge page lies across its end: where one does, a buffer takes up to 2 MiB more."""
    nbytes = 5 * MIB + 2 * PAGE_BYTES
    before = anonymous_bytes()
    memories = [anonymous(nbytes + MIB // 2) for _ in range(16)]
    for memory in memories:
        memory.tensor(torch.uint8, (nbytes,)).fill_(1)
    assert anonymous_bytes() - before < 16 * (nbytes + PAGE_BYTES) + 2 * MIB
    del memories, memory
    assert anonymous_bytes() - before < 4 * MIB


def flags_at(path: Path, offset: int) -> set[str]:
    """List the flags of the mapping of a file's byte (proc_pid_smaps(5), VmFlags)."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            start, stop = (int(text, 16) for text in words[0].split("-"))
            begin = int(words[2], 16)
            here = words[-1] == str(path) and begin <= offset < begin + stop - start
        elif here and words[0] == "VmFlags:":
            return set(words[1:])
    raise AssertionError(f"byte {offset} of {path} is not mapped")


@linux_only("nothing is populated")
def test_a_populated_mapping_is_in_the_page_cache_and_no_more_is_read(disk_path: Path) -> None:
    path, page = disk_path / "large", HUGE_PAGE_BYTES // PAGE_BYTES
    path.write_bytes(os.urandom(16 * MIB + 5))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memory = map_file(file.fileno(), 16 * MIB + 5, str(path))
    assert memory.address % HUGE_PAGE_BYTES == 0
    if any(cached_pages(path)):
        pytest.skip("this file system drops nothing from the page cache")
    if not memory_module._reads_huge_pages():
        pytest.skip("this kernel does not read huge pages (Linux 5.18)")
    assert populate(memory, 3 * MIB, 3 * MIB)
    there = cached_pages(path)
    assert all(there[page : 3 * page])
    assert not any(there[:page] + there[4 * page :])
    assert memory.view(3 * MIB, 3 * MIB) == path.read_bytes()[3 * MIB : 6 * MIB]
    assert {"hg", "rr"} <= flags_at(path, 4 * MIB)
    for place in (0, 10 * MIB):
        assert not {"hg", "rr"} & flags_at(path, place)  # of a table only some rows may be read


@linux_only("nothing is populated")
def test_what_was_written_is_told_of_huge_pages_too(disk_path: Path) -> None:
    path = disk_path / "large"
    path.write_bytes(bytes(range(256)) * (16 * MIB // 256))
    with path.open("rb") as file:
        memory = map_file(file.fileno(), 16 * MIB, str(path))
    assert populate(memory, 0, memory.nbytes)
    assert list(written_pages(memory.address, memory.nbytes) or ()) == []
    memory.view()[5 * MIB] = 1
    memory.view()[9 * MIB : 9 * MIB + 2 * PAGE_BYTES] = bytes(2 * PAGE_BYTES)
    place = memory.address
    wanted = [
        (place + 5 * MIB, place + 5 * MIB + PAGE_BYTES),
        (place + 9 * MIB, place + 9 * MIB + 2 * PAGE_BYTES),
    ]
    assert list(written_pages(place, memory.nbytes) or ()) == wanted
    assert populate(memory, 0, memory.nbytes)
    assert list(written_pages(place, memory.nbytes) or ()) == wanted
    assert discard_written(place + 5 * MIB, MIB)
    assert list(written_pages(place, memory.nbytes) or ()) == wanted[1:]
    assert memory.view()[5 * MIB] == 0
    assert path.read_bytes()[9 * MIB : 9 * MIB + 2] == b"\0\1"


def test_what_cannot_be_populated_is_told(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(2 * PAGE_BYTES))
    with path.open("rb") as file:
        memory = map_file(file.fileno(), 2 * PAGE_BYTES, str(path))
    os.truncate(path, 0)
    assert not populate(memory, 0, memory.nbytes)  # to touch it would end the process


def test_empty_tensors_go_back_to_the_system() -> None:
    empty(torch.bfloat16, (4, MIB)).fill_(1)  # after this an allocator would keep the like
    before = anonymous_bytes()
    tensors = [empty(torch.bfloat16, (4, MIB)).fill_(1) for _ in range(8)]
    assert anonymous_bytes() - before > 60 * MIB
    part = tensors[-1][2:, 5:]
    del tensors
    assert 6 * MIB < anonymous_bytes() - before < 12 * MIB  # a view keeps its own
    assert float(part[0, 0]) == 1
    del part
    assert anonymous_bytes() - before < 4 * MIB


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7), (300, 300)])
def test_empty_makes_what_was_asked(shape: tuple[int, ...]) -> None:
    tensor = empty(torch.float64, shape)
    assert (tensor.shape, tensor.dtype) == (torch.Size(shape), torch.float64)
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == tensor.numel() * 8
    value = noise(torch.float64, shape)
    assert same(tensor.copy_(value), value)


def test_anonymous_memory_of_nothing_is_still_memory() -> None:
    memory = anonymous(0)
    assert memory.nbytes >= 1
    assert memory.view()[0] == 0


def test_memory_that_cannot_be_had_is_named() -> None:
    with pytest.raises(StorageError, match="cannot map memory"):
        anonymous(1 << 60)
