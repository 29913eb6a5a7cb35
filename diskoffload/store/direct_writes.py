"""Whole blocks on their way into a file, past the page cache.

A disk takes them at the speed it has: through the cache the same bytes are copied twice, and
whoever writes them is held up once too many wait there (1.7 GB/s where buffered writing and
fsync reached 0.9, measured). A step is written while the next one is copied and digested.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from diskoffload.system.files import BLOCK_BYTES, Files
from diskoffload.system.memory import Memory, anonymous

STEP_BYTES = 8 << 20
_BUFFERS = 2
assert STEP_BYTES % BLOCK_BYTES == 0


class DirectWrites:
    """Writes to one file, which must be long enough already. For one thread at a time."""

    def __init__(self, files: Files, path: Path, fd: int) -> None:
        """Take charge of a descriptor of :meth:`Files.open_for_writing_past_cache`."""
        self._files, self._path, self._fd = files, path, fd
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="diskoffload-write")
        self._free: list[Memory] = []
        self._running: list[tuple[Future[None], Memory]] = []
        self._made = 0

    def write(self, data: memoryview, offset: int) -> memoryview:
        """Copy whole blocks, and write them soon; give the copy, which nobody changes.

        Args:
            data: at most :data:`STEP_BYTES`, a multiple of the block.
            offset: a multiple of the block.

        Raises:
            StorageError: an earlier write failed.
        """
        assert not len(data) % BLOCK_BYTES
        assert not offset % BLOCK_BYTES
        buffer = self._buffer()
        copy = buffer.view(0, len(data))
        copy[:] = data
        write = self._executor.submit(self._files.write, self._fd, copy, offset, self._path)
        self._running.append((write, buffer))
        return copy

    def _buffer(self) -> Memory:
        if not self._free and self._made < _BUFFERS:
            self._made += 1
            return anonymous(STEP_BYTES)
        if not self._free:
            self._finish_oldest()
        return self._free.pop()

    def _finish_oldest(self) -> None:
        write, buffer = self._running.pop(0)
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
        """End the thread and close the file, whatever became of the writes."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._running.clear()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._files.close(fd)
