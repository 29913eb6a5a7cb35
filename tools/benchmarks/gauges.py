"""What a process can tell of itself: memory, mappings, bytes read, processor time."""

from __future__ import annotations

import resource
import timeit
from typing import Any

_BATCHES = 11
_BATCH_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Memory of its own that the kernel cannot take back (``RssAnon``)."""
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; Linux 4.5 or later is needed")


def mapping_count() -> int:
    """How many mappings it has, of the 65,530 that Linux grants by default."""
    with open("/proc/self/maps", "rb") as lines:
        return sum(1 for _ in lines)


def device_read_bytes() -> int:
    """Bytes that were fetched from a device on its account so far."""
    with open("/proc/self/io", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes")


def cpu_seconds() -> float:
    """Processor time so far, of all its threads, its own and the kernel's."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def per_call_seconds(statement: str, **names: Any) -> float:
    """Time a short statement: the least of several batches, none of them a few ticks long.

    What makes a batch longer than another is something else that runs (see ``timeit``).
    """
    timer = timeit.Timer(statement, globals=names)
    calls, seconds = 1, timer.timeit(1)
    while seconds < _BATCH_SECONDS:
        calls = max(calls * 2, int(calls * _BATCH_SECONDS / max(seconds, 1e-9)))
        seconds = timer.timeit(calls)
    return min(timer.timeit(calls) / calls for _ in range(_BATCHES))
