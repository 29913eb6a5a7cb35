"""A disk made slower for this process, by the kernel, for a while; put back in the end.

Through the first version of the block I/O controller (``admin-guide/cgroup-v1/blkio-controller``),
which delays requests of a group beyond so many bytes a second. What goes through the page cache
is written by the kernel's own threads, which are in no group: only direct reads and writes, and
reads of what is not cached, are slowed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup/blkio")
_READS, _WRITES = "blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"
_MEMBERS = "cgroup.procs"
_REMOVE_SECONDS = 5.0


def disk_of(path: Path) -> str | None:
    """Name the disk that holds a path, as ``"MAJOR:MINOR"``; ``None`` where no disk shows."""
    device = os.stat(path).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        return None
    block = block.resolve()
    if (block / "partition").exists():  # only whole disks are throttled
        block = block.parent
    return (block / "dev").read_text().strip()


def why_not(path: Path) -> str | None:
    """Say why the disk under a path cannot be made slower; ``None`` if it can."""
    if disk_of(path) is None:
        return "the file system lies on no block device that the kernel shows"
    if not (_ROOT / _READS).exists() and not (_ROOT / _MEMBERS).exists():
        return f"the kernel has no block I/O controller of the first version at {_ROOT}"
    if not os.access(_ROOT, os.W_OK):
        return f"only root may make a group in {_ROOT}"
    return None


@contextmanager
def throttled(path: Path, bytes_per_second: int) -> Iterator[None]:
    """Slow reading and writing of the disk under a path, for this process, within the block.

    Raises:
        OSError: the kernel refuses.
    """
    disk = disk_of(path)
    group = _ROOT / f"diskoffload-{uuid.uuid4().hex[:8]}"
    home = _ROOT / _own_group().lstrip("/")
    group.mkdir()
    try:
        for limit in (_READS, _WRITES):
            (group / limit).write_text(f"{disk} {bytes_per_second}")
        (group / _MEMBERS).write_text(str(os.getpid()))
        try:
            yield
        finally:
            (home / _MEMBERS).write_text(str(os.getpid()))
    finally:
        _remove(group)


def _own_group() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if "blkio" in controllers.split(","):
            return place
    return "/"


def _remove(group: Path) -> None:
    """Remove a group; the kernel lets go of its last requests after a moment."""
    until_seconds = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > until_seconds:
                raise
            time.sleep(0.05)
        else:
            return
