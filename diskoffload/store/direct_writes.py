"""Whole blocks on their way into a file, past the page cache.

A disk takes them at the speed it has: through the cache the same bytes are copied twice, and
whoever writes them is held up once too many wait there (1.7 GB/s where buffered writing and
fsync reached 0.9, measured). Some steps are on their way while the next one is filled.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from diskoffload.system.files import BLOCK_BYTES, Files
from diskoffload.system.memory import Memory, anonymous

# Larger ones are no faster on any device that was measured, and smaller ones share the memory
# better: one is filled, and one waits behind each that is being written.
STEP_BYTES = 4 << 20
_THREADS = 2
_BUFFERS = 2 * _THREADS + 1
assert STEP_BYTES % BLOCK_BYTES == 0


class DirectWrites:
    """Writes to one file, which must be long enough already. For one thread at a time."""

    def __init__(self, files: Files, path: Path, fd: int) -> None:
        """Take charge of a descriptor of :meth:`Files.open_for_writing_past_cache`."""
        self._files, self._path, self._fd = files, path, fd
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="diskoffload-write")
        self._free: list[Memory] = []
        self._running: deque[tuple[Future[None], Memory]] = deque()
        self._made = 0

    def take(self) -> Memory:
        """Give a buffer of :data:`STEP_BYTES` to be filled; may wait for an earlier write.

        Raises:
            StorageError: an earlier write failed.
        """
        while self._running and self._running[0][0].done():
            self._finish_oldest()
        if not self._free and self._made < _BUFFERS:
            self._made += 1
            return anonymous(STEP_BYTES)
        if not self._free:
            self._finish_oldest()
        return self._free.pop()

    def give(self, buffer: Memory) -> None:
        """Take a buffer back that needs no writing."""
        self._free.append(buffer)

    def write(self, buffer: Memory, begin: int, nbytes: int, offset: int) -> None:
        """Write whole blocks of a buffer soon; it comes back to :meth:`take` by itself.

        Args:
            buffer: from :meth:`take`; nobody changes it any more.
            begin: where the blocks begin in it, a multiple of the block.
            nbytes: their length, a multiple of the block.
            offset: where they go, a multiple of the block.
        """
        assert not any(one % BLOCK_BYTES for one in (begin, nbytes, offset))
        data = buffer.view(begin, nbytes)
        write = self._executor.submit(self._files.write, self._fd, data, offset, self._path)
        self._running.append((write, buffer))

    def _finish_oldest(self) -> None:
        write, buffer = self._running.popleft()
        self._free.append(buffer)
        write.result()

    def wait(self) -> None:
        """Return when all of it is written.

        Raises:
            StorageError: it could not be.
        """
        while self._running:
            self._finish_oldest()

    def close(self) -> None:
        """End the threads and close the file, whatever became of the writes."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._running.clear()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._files.close(fd)
