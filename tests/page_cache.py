"""Which pages of a file are in the page cache, asked of the kernel without reading one."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def cached_pages(file: Path) -> list[bool]:
    """Tell of each page of a file whether it is in the page cache.

    ``preadv`` with ``RWF_NOWAIT`` would not do: it begins to read ahead, and a quick disk has
    ended that before the call looks again.
    """
    size_bytes = file.stat().st_size
    flags = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.c_char.from_buffer(mapped)
        try:
            address = ctypes.c_void_p(ctypes.addressof(start))
            assert libc.mincore(address, ctypes.c_size_t(size_bytes), flags) == 0
        finally:
            del start
    return [bool(flag & 1) for flag in flags]
