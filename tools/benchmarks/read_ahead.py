"""How far the kernel reads ahead of who reads a device; set for a while and put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYSFS = Path("/sys/dev/block")


def queue_of(path: Path) -> Path | None:
    """Find the request queue of the disk that holds ``path``; ``None`` where no disk shows."""
    device = os.stat(path).st_dev
    block = _SYSFS / f"{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        return None
    block = block.resolve()
    # A partition has no queue of its own, its disk has.
    for place in (block, block.parent):
        if (place / "queue").is_dir():
            return place / "queue"
    return None


def why_not(path: Path) -> str | None:
    """Say why read-ahead cannot be set for the disk under ``path``; ``None`` if it can."""
    queue = queue_of(path)
    if queue is None:
        return "the file system lies on no block device that the kernel shows"
    if not os.access(queue / "read_ahead_kb", os.W_OK):
        return f"{queue / 'read_ahead_kb'} may only be written by root"
    return None


def read_kib(path: Path) -> int | None:
    """Tell how far is read ahead on the disk under ``path``, in KiB."""
    queue = queue_of(path)
    return None if queue is None else int((queue / "read_ahead_kb").read_text())


@contextmanager
def set_to(queue: str, kib: int) -> Iterator[None]:
    """Read so far ahead on a disk within the block; files that are open keep what they had.

    Args:
        queue: as :func:`queue_of` gives it.
        kib: how far.
    """
    setting = Path(queue) / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)
