"""Which memory of ours was written to, whoever wrote: told by the kernel, at no look at a byte.

A range is write-protected, and the first write to a page lifts that page's protection within the
kernel, unseen by whoever writes (userfaultfd(2) with ``UFFD_FEATURE_WP_ASYNC``, and the
``PAGEMAP_SCAN`` request of https://docs.kernel.org/admin-guide/mm/pagemap.html; both Linux 6.7).
Marking 16 MiB of huge pages and asking for them took some 80 microseconds where one digest of
them takes a millisecond (measured).

A device that was given the memory's pages before they were marked, to write to by itself, is not
seen: such memory was registered with a driver (``cudaHostRegister``, RDMA), which none of ours is.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import platform
import struct
import sys
import weakref
from typing import NamedTuple

from diskoffload.system.memory import HUGE_PAGE_BYTES, PAGE_BYTES, Memory, anonymous
from diskoffload.system.portable import IS_LINUX, proc

_log = logging.getLogger(__name__)

# asm/unistd.h; of other machines it is not known here, and the kernel is not asked.
_USERFAULTFD_NUMBERS = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
# linux/userfaultfd.h. What a process may have without a privilege is one of user mode only, and
# that is enough: no fault is ever handed to us.
_USER_MODE_ONLY = 1
_API = 0xAA
_WP_UNPOPULATED = 1 << 13
_WP_ASYNC = 1 << 15
_REGISTER_MODE_WP = 2
_MODE_WP = 1
# linux/fs.h
_PAGE_IS_WRITTEN = 2
_CHECK_IS_WATCHED = 2
_libc = ctypes.CDLL(None, use_errno=True)


def _request(kind: str, number: int, nbytes: int) -> int:
    """Number a request that reads and writes its argument (asm-generic/ioctl.h)."""
    return 3 << 30 | nbytes << 16 | ord(kind) << 8 | number


_UFFDIO_API = _request("\xaa", 0x3F, 24)
_UFFDIO_REGISTER = _request("\xaa", 0x00, 32)
_UFFDIO_WRITEPROTECT = _request("\xaa", 0x06, 24)
_PAGEMAP_SCAN = _request("f", 16, 96)


class Mark(NamedTuple):
    """A range of memory as it was when it was marked.

    Attributes:
        watch: who marked it.
        address: first byte's address.
        nbytes: length in bytes.
    """

    watch: WriteWatch
    address: int
    nbytes: int

    def was_written(self) -> bool | None:
        """Tell whether a page of the range was written to since; ``None`` if nobody can tell.

        So it is in a forked child, which the kernel does not watch. A write that changed
        nothing is one too. Thread-safe.
        """
        return self.watch.was_written(self.address, self.nbytes)


class WriteWatch:
    """Marks memory, for as long as it and the memory live. Thread-safe.

    It has two descriptors, closed when it goes.
    """

    def __init__(self, watching_fd: int, asking_fd: int) -> None:
        self._watching_fd = watching_fd
        self._asking_fd = asking_fd
        # The descriptors that a forked child inherits would change the parent's memory.
        self._pid = os.getpid()
        closing = weakref.finalize(self, _close, watching_fd, asking_fd)
        closing.atexit = False  # weights may be read, and their marks asked for, until the very end

    def watch(self, memory: Memory) -> bool:
        """See to it that a memory can be marked; tell whether it can."""
        if self._pid != os.getpid():
            return False
        start, stop = _pages(memory.address, memory.nbytes)
        argument = struct.pack("4Q", start, stop - start, _REGISTER_MODE_WP, 0)
        return self._ask(_UFFDIO_REGISTER, argument)

    def open(self, memory: Memory) -> None:
        """Take the marks off a memory: it is about to be written to, and nobody is to note it.

        Without this each page, huge ones too, would be freed of its mark by itself.
        """
        if self._pid == os.getpid():
            start, stop = _pages(memory.address, memory.nbytes)
            self._ask(_UFFDIO_WRITEPROTECT, struct.pack("3Q", start, stop - start, 0))

    def mark(self, memory: Memory, offset: int, nbytes: int) -> Mark | None:
        """Mark part of a watched memory.

        Args:
            memory: nobody writes to it meanwhile.
            offset: where the part begins, in bytes.
            nbytes: its length, more than zero.

        Returns:
            ``None`` if the kernel refuses.
        """
        if self._pid != os.getpid():
            return None
        address = memory.address + offset
        _, end = _pages(memory.address, memory.nbytes)
        # Whole huge pages, for one that is marked in part is split.
        start = max(memory.address, address // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
        stop = min(end, -(-(address + nbytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
        argument = struct.pack("3Q", start, stop - start, _MODE_WP)
        return Mark(self, address, nbytes) if self._ask(_UFFDIO_WRITEPROTECT, argument) else None

    def _ask(self, request: int, argument: bytes) -> bool:
        try:
            fcntl.ioctl(self._watching_fd, request, bytearray(argument))
        except OSError as error:
            _log.debug("the kernel does not watch this memory: %s", error)
            return False
        return True

    def was_written(self, address: int, nbytes: int) -> bool | None:
        """Tell whether a page of marked memory was written to; see :meth:`Mark.was_written`."""
        if self._pid != os.getpid():
            return None
        start, stop = _pages(address, nbytes)
        found = (ctypes.c_uint64 * 3)()
        # struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, and which
        # categories: inverted, all of, any of, to be told.
        sought = (0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)
        where = (start, stop, 0, ctypes.addressof(found), 1, 1)
        argument = bytearray(struct.pack("12Q", 96, _CHECK_IS_WATCHED, *where, *sought))
        try:
            return bool(fcntl.ioctl(self._asking_fd, _PAGEMAP_SCAN, argument))
        except OSError as error:
            _log.debug("the kernel does not tell what was written to: %s", error)
            return None


def write_watch() -> WriteWatch | None:
    """Begin to watch writes, where the kernel does that, and was seen to.

    ``None`` elsewhere: before Linux 6.7, where userfaultfd is not allowed (Docker's own rules
    forbid it), on portable paths.
    """
    number = _USERFAULTFD_NUMBERS.get(platform.machine())
    if not IS_LINUX or number is None or sys.maxsize < 1 << 32:
        return None
    flags = _USER_MODE_ONLY | os.O_CLOEXEC
    watching_fd = int(_libc.syscall(number, flags))
    if watching_fd < 0:
        return None
    asking_fd = -1
    try:
        wanted = struct.pack("3Q", _API, _WP_UNPOPULATED | _WP_ASYNC, 0)
        fcntl.ioctl(watching_fd, _UFFDIO_API, bytearray(wanted))
        asking_fd = os.open(proc("self/pagemap"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        _close(watching_fd, asking_fd)
        return None
    watch = WriteWatch(watching_fd, asking_fd)
    return watch if _is_true(watch) else None


def _is_true(watch: WriteWatch) -> bool:
    """Try it: what is relied on silently is seen to work first."""
    memory = anonymous(2 * PAGE_BYTES)
    view = memory.view()
    view[0] = view[PAGE_BYTES] = 1
    mark = watch.mark(memory, 0, 2 * PAGE_BYTES) if watch.watch(memory) else None
    if mark is None or mark.was_written() is not False:
        return False
    view[PAGE_BYTES] = 1
    return mark.was_written() is True and watch.was_written(memory.address, 1) is False


def _pages(address: int, nbytes: int) -> tuple[int, int]:
    first = address // PAGE_BYTES * PAGE_BYTES
    return first, -(-(address + nbytes) // PAGE_BYTES) * PAGE_BYTES


def _close(*descriptors: int) -> None:
    for one in descriptors:
        if one >= 0:
            with contextlib.suppress(OSError):
                os.close(one)
