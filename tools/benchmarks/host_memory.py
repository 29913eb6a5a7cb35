"""Touches memory that a virtual machine's host may have taken back, before something is timed.

Where the host takes free memory back (free page reporting of the balloon driver), whoever
touches such a page first waits for the host, 1 to 4 seconds a GiB where this was written.
Who caches or copies much pays for that, and who reuses one buffer does not: the speed of a
host, not of a library. So before a timing as much memory is touched and freed as will be used.
"""

from __future__ import annotations

import mmap
from pathlib import Path

_BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTING_BIT = 5  # VIRTIO_BALLOON_F_REPORTING


def is_taken_back() -> bool:
    """Tell whether the host takes back what the machine has free."""
    for features in _BALLOONS.glob("virtio*/features"):
        try:
            bits = features.read_text()
        except OSError:
            continue
        if bits[_REPORTING_BIT : _REPORTING_BIT + 1] == "1":
            return True
    return False


def settle(nbytes: int) -> None:
    """Touch so much memory and free it, if the host may have taken it back."""
    if nbytes <= 0 or not is_taken_back():
        return
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        memory[offset] = 1
    memory.close()


NOTE = (
    "The host of this virtual machine takes back free memory, so each process touched as much "
    "as it would use before it was timed (tools/benchmarks/host_memory.py says why)."
)
"""For the figures that do so, where :func:`is_taken_back`."""
