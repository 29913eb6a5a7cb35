"""How many processors this process may use."""

from __future__ import annotations

import os

from diskoffload.system.portable import of_linux


def processor_count() -> int:
    """Tell how many it may use where the system says so, else how many there are; at least 1."""
    affinity = of_linux(os, "sched_getaffinity")
    return (len(affinity(0)) if affinity is not None else os.cpu_count()) or 1
