"""Takes files out of the page cache, and looks whether they really left.

``POSIX_FADV_DONTNEED`` and ``/proc/sys/vm/drop_caches`` skip what is dirty and what a process
maps, without a word. Only ``mincore(2)`` tells.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_MAP_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class StillCachedError(OSError):
    """Files stay in the page cache although they were dropped; the message names a holder."""


def resident_bytes(path: Path) -> int:
    """Tell how much of a file is in the page cache, by whole pages.

    Raises:
        OSError: the system does not tell.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(fd).st_size
        if not nbytes:
            return 0
        address = _libc.mmap(None, nbytes, _PROT_NONE, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == _MAP_FAILED:
        raise _error("could not map the file", path)
    try:
        pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        if _libc.mincore(address, nbytes, pages):
            raise _error("could not ask what of it is in memory", path)
    finally:
        _libc.munmap(address, nbytes)
    # Only the lowest bit is defined.
    absent = bytes(pages).translate(bytes(value & 1 for value in range(256))).count(0)
    return (len(pages) - absent) * mmap.PAGESIZE


def drop(paths: Sequence[Path]) -> None:
    """Take files out of the page cache and check that nothing of them is left there.

    Each file is written back and dropped by itself; only if that is not enough, and the user
    may do so, all of the system's clean caches go.

    Raises:
        StillCachedError: something is left.
    """
    for path in paths:
        let_go(path)
    if not any(resident_bytes(path) for path in paths):
        return
    if os.access(_DROP_CACHES, os.W_OK):
        os.sync()
        _DROP_CACHES.write_text("1")
    left = {path: resident_bytes(path) for path in paths}
    left = {path: nbytes for path, nbytes in left.items() if nbytes}
    if left:
        path, nbytes = next(iter(left.items()))
        raise StillCachedError(
            f"dropped {len(paths)} files from the page cache and {len(left)} are still in it, "
            f"{nbytes} bytes of {path.name} for example, which {_holders(path)}; end what "
            "holds them, or nothing that is read will be read from the disk"
        )


def let_go(path: Path) -> None:
    """Take a file out of the page cache, but for what a process has mapped and read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # dirty pages would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _holders(path: Path) -> str:
    """Name the processes that map a file, as far as one may look."""
    wanted = str(path.resolve())
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if any(line.rstrip("\n").endswith(wanted) for line in maps.open()):
                found.append(maps.parent.name)
        except OSError:
            continue
    return f"process {', '.join(found)} maps" if found else "no process that can be seen maps"


def _error(what: str, path: Path) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}", str(path))
