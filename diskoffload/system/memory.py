"""Memory as the operating system gives it: private file mappings and anonymous buffers.

Everything goes through ``ctypes``: unlike the ``mmap`` module it keeps no descriptor open
for a mapping, and lets other Python threads run during a long call.

Every :class:`Memory` is returned to the system when the last object that uses it goes, a
tensor made from it included; there is no ``close``, because closing a mapping beneath a
live tensor leaves a dangling pointer.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys
import weakref
from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch

from diskoffload.errors import StorageError
from diskoffload.system.portable import IS_LINUX, proc

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20

# mman.h on Linux; absent from the mmap module before Python 3.13. Elsewhere either nothing is
# reserved anyway, or a file larger than memory is refused and then read.
_MAP_NORESERVE = 0x4000 if IS_LINUX else 0
# The same number on Linux, macOS and the BSDs.
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_RANDOM = 1
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_PROT_NONE = 0
_HUGE_READS_SINCE = (5, 18)
_HUGE_FROM_BYTES = 4 << 20
# The last mappings before the limit may be refused where one has to be split.
_NEARLY_ALL = 0.99
_PAGEMAP_PRESENT_OR_SWAPPED = np.uint64(0b11 << 62)
_PAGEMAP_FILE_BACKED = np.uint64(1 << 61)
_PAGEMAP_ENTRY_BYTES = 8
_PAGEMAP_READ_PAGES = 1 << 16

# Our own attribute, and the argument of the question.
_UNUSED_REFERENCES = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# ctypes' own way to a view needs a type for each length.
_view_at = ctypes.pythonapi.PyMemoryView_FromMemory
_view_at.restype = ctypes.py_object
_view_at.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_READABLE = 0x100  # PyBUF_READ, object.h
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
_LET_OTHERS_RUN_BYTES = 1 << 16
_malloc_trim = getattr(_libc, "malloc_trim", None) if IS_LINUX else None


class Memory:
    """A range of addresses that tensors can alias.

    Attributes:
        address: first byte's address.
        nbytes: length in bytes.
        huge_pages: numbers of those that the kernel was told to read whole, see :func:`populate`.

    Thread-safe: nothing else changes after it was made.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.huge_pages: set[int] = set()
        # A subclass of its own, because plain ctypes arrays are cached by their type.
        array_type: Any = type("_Range", (ctypes.c_ubyte * nbytes,), {})
        self._array = array_type.from_address(address)
        # The array is what a tensor refers to, so the range outlives this object if need be.
        finalizer = weakref.finalize(self._array, _unmap, address, nbytes)
        # At interpreter exit tensors may still be alive; the process' end unmaps anyway.
        finalizer.atexit = False
        _ranges[address] = self._array

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """Make a contiguous CPU tensor that aliases this memory and keeps it alive.

        It has a storage of its own, so that its use can be counted and ``torch.save``
        writes it alone. ``offset`` is in bytes and a multiple of the dtype's size.
        """
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._array, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    def move(self, begin: int, target: int, nbytes: int) -> None:
        """Move bytes within this memory; the two places may overlap."""
        ctypes.memmove(self.address + target, self.address + begin, nbytes)

    def is_used(self) -> bool:
        """Whether a tensor or a view made from this still lives."""
        return sys.getrefcount(self._array) > _UNUSED_REFERENCES

    def view(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """Give a writable view of ``nbytes`` bytes from ``offset``; it keeps the memory alive."""
        stop = self.nbytes if nbytes is None else offset + nbytes
        return memoryview(self._array).cast("B")[offset:stop]


_ranges: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def is_counted(tensor: torch.Tensor) -> bool:
    """Whether whoever uses a tensor's memory counts as a user of its storage.

    The array or buffer that a tensor was made from (``torch.from_numpy``, ``frombuffer``, DLPack)
    is its owner's, who may write to it with no tensor at hand. A storage on such memory cannot be
    resized; nor can one of which an array was ever made, of which this says no as well.
    """
    storage = tensor.untyped_storage()
    return storage.resizable() or storage.data_ptr() in _ranges


def _unmap(address: int, nbytes: int) -> None:
    _libc.munmap(address, nbytes)


def _map(nbytes: int, flags: int, fd: int, what: str) -> Memory:
    """Map privately, to be read and written; large ones from a huge page's beginning on.

    So none lies across the end of one, which would be taken whole, and be given back with neither
    of the two that share it; and the kernel can lay huge pages of a file's cache beneath.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags |= mmap.MAP_PRIVATE
    is_huge = IS_LINUX and nbytes >= _HUGE_FROM_BYTES
    place = _aligned_place(nbytes) if is_huge else None
    if place is not None:
        flags |= _MAP_FIXED
    address = _libc.mmap(place, nbytes, protection, flags, fd, 0)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        if place is not None:
            _unmap(place, nbytes)
        hint = _about_full() if code == errno.ENOMEM else "check that the file system supports mmap"
        raise StorageError(code, f"cannot map {what} ({nbytes} bytes): {os.strerror(code)}; {hint}")
    if is_huge and fd < 0:
        _libc.madvise(address, nbytes, _MADV_HUGEPAGE)
    return Memory(int(address), nbytes)


@cache
def _reads_huge_pages() -> bool:
    """Whether a page that is missed in a mapping advised so is read with its huge page.

    Linux 5.18 does (mm/filemap.c, do_sync_mmap_readahead). Before, and without huge pages, a
    mapping that is to be read at random is read page by page.
    """
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    return version >= _HUGE_READS_SINCE and os.path.exists("/sys/kernel/mm/transparent_hugepage")


def _aligned_place(nbytes: int) -> int | None:
    """Reserve addresses for so many bytes from a huge page's beginning on, if they can be had."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    whole_bytes = nbytes + HUGE_PAGE_BYTES
    first = _libc.mmap(None, whole_bytes, _PROT_NONE, flags, -1, 0)
    if first == _MAP_FAILED:
        return None
    before = -first % HUGE_PAGE_BYTES
    if before:
        _unmap(first, before)
    stop = -(-(first + before + nbytes) // PAGE_BYTES) * PAGE_BYTES
    _unmap(stop, first + whole_bytes - stop)
    return int(first + before)


def _about_full() -> str:
    """Say what is used up when the system has no place for a mapping: seldom it is memory."""
    try:
        with open(proc("sys/vm/max_map_count"), encoding="ascii") as file:
            most = int(file.read())
        with open(proc("self/maps"), "rb") as lines:
            count = sum(1 for _ in lines)
    except (OSError, ValueError):  # not Linux, or no descriptor is left
        most, count = 0, 0
    if count >= most * _NEARLY_ALL > 0:
        return (
            f"it has {count} mappings and vm.max_map_count allows {most}: raise that "
            "(sysctl -w vm.max_map_count=...), or use fewer files"
        )
    return "raise the address-space limit (ulimit -v), vm.overcommit_ratio or vm.max_map_count"


def map_file(fd: int, nbytes: int, what: str) -> Memory:
    """Map the first ``nbytes`` bytes of a file privately and without reserving swap.

    Writing to the memory changes neither the file nor what other mappings see: the
    kernel copies the page that is written. ``fd`` may be closed afterwards.

    A page that cannot be had when it is touched (the device fails, the file was truncated
    meanwhile) is not an exception but SIGBUS, which ends the process: nothing can notice it.

    Args:
        fd: descriptor, open for reading.
        nbytes: length in bytes, more than zero and at most the file's.
        what: the file's name, for messages.

    Raises:
        StorageError: the system refuses the mapping.
    """
    return _map(nbytes, _MAP_NORESERVE, fd, what)


def anonymous(nbytes: int) -> Memory:
    """Get zeroed memory straight from the system, in huge pages where it is large.

    It goes back to the system as a whole when its last user goes, where the C library's
    allocator would keep it (762 MB after sixteen blocks of 64 MiB, on glibc 2.36).
    """
    return _map(max(nbytes, 1), mmap.MAP_ANONYMOUS, -1, "memory")


def empty(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Make an uninitialised CPU tensor whose memory goes back to the system with it."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < PAGE_BYTES * 16:
        return torch.empty(shape, dtype=dtype)
    return anonymous(nbytes).tensor(dtype, shape)


def elements_overlap(tensor: torch.Tensor) -> bool:
    """Tell whether some elements of a strided tensor share memory, as an expanded one's do.

    It may say so of layouts that only :func:`torch.as_strided` makes and that do not.
    """
    steps = sorted(
        (step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    )
    reach = 0
    for step, n in steps:
        if step <= reach:
            return tensor.numel() > 0
        reach += (n - 1) * step
    return False


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor's bytes; the view keeps its memory alive."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data.cast("B")


def borrowed_bytes(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor's bytes for as long as the caller holds its memory.

    A tenth of what :func:`tensor_bytes` costs, which counts where thousands are small.
    """
    nbytes = tensor.numel() * tensor.dtype.itemsize
    return _view_at(tensor.data_ptr(), nbytes, _READABLE) if nbytes else memoryview(b"")


def is_laid_plainly(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's value is the bytes at its address, in order, on the CPU."""
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def copy_bytes(source: memoryview, target: memoryview) -> None:
    """Copy bytes; other Python threads run meanwhile where there are many."""
    if len(source) < _LET_OTHERS_RUN_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def trim_heap() -> None:
    """Have the C library give freed memory back to the system, where it knows how (glibc).

    Left alone glibc keeps freed blocks below 32 MiB for reuse (mallopt(3), M_MMAP_THRESHOLD)
    and never returns those under a block still in use: a loop that replaced 1.2 GB of
    weights one by one kept all of them.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def written_pages(address: int, nbytes: int) -> Iterator[tuple[int, int]] | None:
    """Find the pages of a private file mapping that this process has written to.

    Args:
        address: first byte of interest; need not lie at a page's start.
        nbytes: how many bytes are of interest.

    Returns:
        Runs ``(start, stop)`` of addresses, whole pages each, or ``None`` where the
        kernel does not say (no ``/proc/self/pagemap``: macOS, gVisor, after setuid).

    A page was written if it is present or swapped out and no longer backed by the file
    (https://docs.kernel.org/admin-guide/mm/pagemap.html, bits 61 to 63).
    """
    try:
        os.close(os.open(proc("self/pagemap"), os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return None
    return _written_runs(address // PAGE_BYTES, -(-(address + nbytes) // PAGE_BYTES))


def _written_runs(first: int, last: int) -> Iterator[tuple[int, int]]:
    # Opened at the first step: an iterator that is never begun runs no clean-up.
    try:
        fd = os.open(proc("self/pagemap"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(
            error.errno, f"could not ask for edits: {error.strerror}; try again"
        ) from error
    try:
        for begin in range(first, last, _PAGEMAP_READ_PAGES):
            count = min(_PAGEMAP_READ_PAGES, last - begin)
            raw = os.pread(fd, count * _PAGEMAP_ENTRY_BYTES, begin * _PAGEMAP_ENTRY_BYTES)
            flags = np.frombuffer(raw, dtype=np.uint64)
            written = ((flags & _PAGEMAP_PRESENT_OR_SWAPPED) != 0) & (
                (flags & _PAGEMAP_FILE_BACKED) == 0
            )
            edges = np.flatnonzero(np.diff(np.concatenate(([False], written, [False]))))
            for start, stop in edges.reshape(-1, 2).tolist():
                yield (begin + start) * PAGE_BYTES, (begin + stop) * PAGE_BYTES
    finally:
        os.close(fd)


def is_resident(address: int) -> bool:
    """Whether the page of an address is in memory, mapped by this process or not (``mincore(2)``).

    ``False`` where that is not told. Of a file that is not one's own the kernel always says so.
    """
    told = ctypes.c_ubyte()
    page = address // PAGE_BYTES * PAGE_BYTES
    return (
        IS_LINUX and not _libc.mincore(page, PAGE_BYTES, ctypes.byref(told)) and told.value & 1 == 1
    )


def populate(memory: Memory, offset: int, nbytes: int) -> bool:
    """Bring bytes of a file's mapping into memory, and beneath it; other threads run meanwhile.

    From a large mapping the kernel reads huge pages then, where the file system has such (ext4
    since Linux 6.16, xfs since 5.18): four threads read 1.6 GB at the device's 2.2 GB/s with 0.08 s
    of processor, where a hint (``POSIX_FADV_WILLNEED``) and a fault for each page ran at 1.1 GB/s
    with 0.63 s (measured). Whole huge pages are read, and nothing ahead of them. Of what was never
    populated the kernel reads as it does of any mapping: a few rows of a table cost no more.

    Args:
        memory: of :func:`map_file`.
        offset: where the bytes begin in it.
        nbytes: how many they are, more than zero.

    Returns:
        Whether that was done: Linux 5.14 knows the request (madvise(2), ``MADV_POPULATE_READ``),
        and refuses it where a page cannot be had.
    """
    if not IS_LINUX:
        return False
    first, last = offset // HUGE_PAGE_BYTES, -(-(offset + nbytes) // HUGE_PAGE_BYTES)
    start = memory.address + first * HUGE_PAGE_BYTES
    length = min(last * HUGE_PAGE_BYTES, memory.nbytes) - first * HUGE_PAGE_BYTES
    wants_advice = memory.nbytes >= _HUGE_FROM_BYTES and _reads_huge_pages()
    if wants_advice and not memory.huge_pages.issuperset(range(first, last)):
        _libc.madvise(start, length, _MADV_HUGEPAGE)
        _libc.madvise(start, length, _MADV_RANDOM)
        memory.huge_pages.update(range(first, last))
    address = (memory.address + offset) // PAGE_BYTES * PAGE_BYTES
    stop = -(-(memory.address + offset + nbytes) // PAGE_BYTES) * PAGE_BYTES
    return bool(_libc.madvise(address, stop - address, _MADV_POPULATE_READ) == 0)


def can_discard() -> bool:
    """Whether :func:`discard_written` can give back pages here."""
    return IS_LINUX


def discard_written(address: int, nbytes: int) -> bool:
    """Give back the written pages that lie wholly in a range of a private file mapping.

    What was written there is lost: the range reads as the file again.

    Returns:
        Whether that is so. Linux's ``madvise`` alone drops what was written; elsewhere
        :func:`map_again` does, which needs the file.
    """
    first, last = _whole_pages(address, nbytes)
    if last > first and can_discard():
        return bool(_libc.madvise(first, last - first, _MADV_DONTNEED) == 0)
    return last <= first


def map_again(memory: Memory, fd: int, address: int, nbytes: int) -> None:
    """Map anew the pages that lie wholly in a range of what :func:`map_file` has given.

    What was written there is lost, as by :func:`discard_written`. Nobody may use the range
    meanwhile.

    Args:
        memory: the file's mapping.
        fd: descriptor of the same file, open for reading.
        address: first byte of the range.
        nbytes: its length in bytes.

    Raises:
        StorageError: the system refuses.
    """
    first, last = _whole_pages(address, nbytes)
    if last <= first:
        return
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED
    offset = first - memory.address
    if _libc.mmap(first, last - first, protection, flags, fd, offset) == _MAP_FAILED:
        code = ctypes.get_errno()
        raise StorageError(code, f"cannot map {last - first} bytes anew: {os.strerror(code)}")


def _whole_pages(address: int, nbytes: int) -> tuple[int, int]:
    first = -(-address // PAGE_BYTES) * PAGE_BYTES
    return first, (address + nbytes) // PAGE_BYTES * PAGE_BYTES


def own_bytes_of_process() -> int:
    """Estimate, in some microseconds, what memory of its own this process has; 0 off Linux.

    Resident pages that no file backs (proc_pid_statm(5)): some 64 pages a thread too few or
    too many, because the kernel counts in batches.
    """
    try:
        fd = os.open(proc("self/statm"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fields = os.read(fd, 128).split()
    finally:
        os.close(fd)
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES


def anonymous_bytes_of_process() -> int | None:
    """Tell how much anonymous memory this process has resident, or ``None`` off Linux.

    A gauge for reports: nothing is decided by it, so it works whatever paths are taken.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
