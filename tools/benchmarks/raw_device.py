"""What the device itself does: direct reads and writes of large blocks, past the page cache.

Two threads, blocks of 8 MiB, one reused aligned buffer each: what a program can have that
does nothing else.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .results import Sample

READ_LABEL = "raw device, direct read"
WRITE_LABEL = "raw device, direct write"
_BLOCK_BYTES = 8 << 20
_THREADS = 2
_ALIGNMENT_BYTES = 4096
_RANDOM_BYTES = 1 << 20
_Move = Callable[[memoryview, int], None]


def read(paths: Sequence[str], scratch: str) -> list[Sample]:
    """Read files from end to end. (An arm's work.)"""
    del scratch
    moved_bytes = 0
    direct = True
    seconds = 0.0
    for name in paths:
        nbytes = os.stat(name).st_size
        fd, is_direct = open_direct(Path(name), os.O_RDONLY)
        direct &= is_direct
        try:
            seconds += _move(nbytes, partial(_read, fd))
        finally:
            os.close(fd)
        moved_bytes += nbytes
    return _samples(moved_bytes, seconds, direct)


def write(nbytes: int, scratch: str) -> list[Sample]:
    """Write a new file of so many random bytes and wait until it is safe. (An arm's work.)"""
    fd, direct = open_direct(Path(scratch, "raw"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        started_seconds = time.perf_counter()
        _move(nbytes, partial(_write, fd))
        os.fsync(fd)
        seconds = time.perf_counter() - started_seconds
    finally:
        os.close(fd)
    return _samples(nbytes, seconds, direct)


def _samples(nbytes: int, seconds: float, direct: bool) -> list[Sample]:
    return [
        Sample("seconds", seconds),
        Sample("moved_bytes", nbytes),
        Sample("bytes_per_second", nbytes / seconds),
        Sample("is_direct", float(direct)),
    ]


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open a file past the page cache, or through it where the file system refuses that."""
    flags |= os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600), hasattr(os, "O_DIRECT")
    except OSError:
        path.unlink() if flags & os.O_CREAT and path.exists() else None
        return os.open(path, flags, 0o600), False


def _read(fd: int, block: memoryview, offset: int) -> None:
    if not os.preadv(fd, [block], offset):
        raise OSError(f"the file ended before offset {offset} while it was read")


def _write(fd: int, block: memoryview, offset: int) -> None:
    if os.pwrite(fd, block, offset) != len(block):
        raise OSError(f"a block at offset {offset} was not written whole; the disk may be full")


def _move(nbytes: int, move: _Move) -> float:
    """Move blocks from two threads until all bytes were; tell the seconds."""
    offsets = iter(range(0, nbytes, _BLOCK_BYTES))
    lock = threading.Lock()
    faults: list[OSError] = []
    buffers = [_buffer() for _ in range(_THREADS)]

    def work(buffer: memoryview) -> None:
        while not faults:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            # Direct transfers are of whole sectors: a file's end may lie within the last.
            length = min(_BLOCK_BYTES, nbytes - offset)
            length = -(-length // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            try:
                move(buffer[:length], offset)
            except OSError as error:
                faults.append(error)

    threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
    started_seconds = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started_seconds
    if faults:
        raise faults[0]
    return seconds


def _buffer() -> memoryview:
    """Give page-aligned memory that holds nothing a device could compress."""
    memory = mmap.mmap(-1, _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(os.urandom(_RANDOM_BYTES) * (_BLOCK_BYTES // _RANDOM_BYTES))
    return memoryview(memory)
