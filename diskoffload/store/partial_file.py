"""A file being written under another name until it is whole.

What is large goes past the page cache, where the file system can; the rest is synced now and
then, so that a container's memory does not fill with what waits to be written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from diskoffload.errors import StorageError
from diskoffload.store.direct_writes import STEP_BYTES, DirectWrites
from diskoffload.system.files import BLOCK_BYTES, Files
from diskoffload.system.memory import Memory, copy_bytes

_WRITE_STEP_BYTES = 8 << 20
_WRITE_BEHIND_BYTES = 64 << 20
# Smaller files fit the page cache, and are likely read from there soon.
_DIRECT_FROM_BYTES = 32 << 20
# Less at a time a disk takes slower than the page cache does.
_LEAST_DIRECT_BYTES = 1 << 20
# So few that belong elsewhere in the file do not end what waits, which would leave parts of blocks;
# they wait beside it, because a file takes no write while it takes one past the cache (1 ms each).
_FEW_BYTES = 4096
_MOST_ASIDE_BYTES = 64 << 10


def partial_path(path: Path) -> Path:
    """Give the name of a file that is not whole yet."""
    return path.with_name(path.name + ".partial")


class PartialFile:
    """A file that has its name only when it is published; until then ``.partial`` follows it.

    Not thread-safe.

    Attributes:
        path: the final name.
        partial: the name until then.
        fd: the open file; -1 when it was closed.
    """

    def __init__(self, path: Path, files: Files, fd: int, size_bytes: int) -> None:
        """Take charge of the open file of the name ``partial_path(path)``.

        Args:
            path: the final name.
            files: the file operations.
            fd: a descriptor for reading and writing.
            size_bytes: what it will have, about; a large one is written past the page cache.
        """
        self.path = path
        self.partial = partial_path(path)
        self.fd = fd
        self._files = files
        self._size_bytes = size_bytes
        # What waits to be written: it ends at ``_end`` in the file, and begins at ``_first`` in
        # the step, which is a buffer of direct writes or ``_copies``.
        self._end = -1
        self._waiting_bytes = self._first = 0
        self._step: memoryview | None = None
        self._buffer: Memory | None = None
        self._copies = bytearray()
        self._aside = bytearray()
        self._aside_offset = 0
        self._since_flush_bytes = 0
        self._has_failed = False  # a write or sync: then it is not known what is in the file
        self._name_is_durable = False
        self._direct: DirectWrites | None = None
        self._may_go_direct = size_bytes >= _DIRECT_FROM_BYTES

    def put(self, data: memoryview, offset: int) -> None:
        """Write bytes that nobody changes meanwhile, through the page cache."""
        with self._noting_failure():
            self._files.write(self.fd, data, offset, self.partial)
        self.account(len(data))

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._has_failed = True
            raise

    def account(self, nbytes: int) -> None:
        """Count what was written through the page cache, and see to it that not too much waits."""
        self._since_flush_bytes += nbytes
        if self._since_flush_bytes >= _WRITE_BEHIND_BYTES:
            # Else a container's memory fills with dirty pages and the writer is throttled.
            self.sync_data()
            self._files.drop_from_cache(self.fd, 0, 0)
            self._since_flush_bytes = 0

    def write(self, data: memoryview, offset: int, digest: xxhash.xxh3_128 | None = None) -> None:
        """Write bytes; what is in the file agrees with the digest whoever changes them meanwhile.

        They are copied, and written as those of :meth:`fill`.
        """

        def copy(part: memoryview, begin: int) -> None:
            copy_bytes(data[begin : begin + len(part)], part)

        self.fill(len(data), offset, copy, digest)

    def fill(
        self,
        nbytes: int,
        offset: int,
        fill_part: Callable[[memoryview, int], object],
        digest: xxhash.xxh3_128 | None = None,
    ) -> None:
        """Write bytes that somebody puts into memory of ours, part after part.

        They wait until a step is full that follows on in the file, so that thousands of small
        tensors take a few writes; few bytes from elsewhere wait beside it. :meth:`sync_data` and
        :meth:`publish` write what waits. Where blocks can go past the page cache the file must be
        long enough already.

        Args:
            nbytes: how many.
            offset: of the first in the file.
            fill_part: puts them there; it is told how many went before. What it raises goes
                through, and what was filled before may be in the file.
            digest: brought up to date with them.

        Raises:
            StorageError: these bytes or earlier ones could not be written.
        """
        if offset != self._end:
            if self._waiting_bytes and nbytes <= _FEW_BYTES:
                few = memoryview(bytearray(nbytes))
                fill_part(few, 0)
                if digest is not None:
                    digest.update(few)
                self._set_aside(few, offset)
                return
            self._write_waiting()
            self._end = offset
        begin = 0
        while begin < nbytes:
            step = self._step or self._take_step()
            place = self._first + self._waiting_bytes
            part = step[place : place + nbytes - begin]
            fill_part(part, begin)
            if digest is not None:
                digest.update(part)
            self._waiting_bytes += len(part)
            self._end += len(part)
            begin += len(part)
            if place + len(part) == len(step):
                self._write_waiting()

    def _set_aside(self, few: memoryview, offset: int) -> None:
        end = self._aside_offset + len(self._aside)
        if offset != end or len(self._aside) >= _MOST_ASIDE_BYTES:
            self._put_aside()
            self._aside_offset = offset
        self._aside += few

    def _put_aside(self) -> None:
        aside, self._aside = self._aside, bytearray()
        if aside:
            self.put(memoryview(aside), self._aside_offset)

    def _take_step(self) -> memoryview:
        """Give room for what is to wait: blocks of the file begin where those of a buffer do."""
        self._first = 0
        if self._goes_direct():
            assert self._direct is not None  # it was just begun
            with self._noting_failure():  # perhaps of an earlier step
                self._buffer = self._direct.take()
            self._first = self._end % BLOCK_BYTES
            step = self._buffer.view(0, STEP_BYTES)
        else:
            if not self._copies:
                self._copies = bytearray(min(_WRITE_STEP_BYTES, max(self._size_bytes, 1)))
            step = memoryview(self._copies)
        self._step = step
        return step

    def _write_waiting(self) -> None:
        """Write what waits: whole blocks past the page cache, if there are enough of them."""
        step, nbytes = self._step, self._waiting_bytes
        if step is None or not nbytes:
            return
        buffer, direct = self._buffer, self._direct
        self._step, self._buffer, self._waiting_bytes = None, None, 0
        begin, end = self._first, self._first + nbytes
        offset = self._end - end  # of the step's first byte in the file
        first, last = begin, begin
        if buffer is not None:
            first = -(-begin // BLOCK_BYTES) * BLOCK_BYTES
            last = max(first, end // BLOCK_BYTES * BLOCK_BYTES)
            if last - first < _LEAST_DIRECT_BYTES:
                first = last = begin
        # Blocks of which this has a part only: other parts of them may come or be there.
        for start, stop in ((begin, first), (last, end)):
            if start < stop:
                self.put(step[start:stop], offset + start)
        if buffer is None:
            return
        assert direct is not None  # it gave the buffer
        if first == last:
            direct.give(buffer)
            return
        with self._noting_failure():
            direct.write(buffer, first, last - first, offset + first)

    def _goes_direct(self) -> bool:
        if self._may_go_direct and self._direct is None:
            fd = self._files.open_for_writing_past_cache(self.partial)
            self._may_go_direct = fd is not None
            if fd is not None:
                self._direct = DirectWrites(self._files, self.partial, fd)
        return self._may_go_direct

    def end_direct(self) -> None:
        """Write what waits, and wait for what goes past the page cache; what follows goes through.

        Raises:
            StorageError: it could not be written.
        """
        try:
            self._write_waiting()
            self._put_aside()
        finally:
            self._end_direct()

    def _end_direct(self) -> None:
        direct, self._direct, self._may_go_direct = self._direct, None, False
        if direct is not None:
            try:
                with self._noting_failure():
                    direct.wait()
            finally:
                direct.close()

    def sync(self) -> None:
        """Make what was written so far durable, and that the file is there.

        Raises:
            StorageError: it is not, or perhaps not; then neither is it at any later call, since
                the system may report a lost write only once; so too after a write that failed.
                What an earlier call made durable stays so.
        """
        self.sync_data()
        if not self._name_is_durable:
            self._files.sync_folder(self.path.parent)
            self._name_is_durable = True

    def sync_data(self) -> None:
        """Make what was written so far durable; raises as :meth:`sync` does."""
        if self._has_failed or self.fd < 0:
            raise StorageError(
                errno.EIO,
                "could not sync the file: that failed before, or a write to it",
                str(self.partial),
            )
        self._write_waiting()
        self._put_aside()
        with self._noting_failure():
            if self._direct is not None:
                self._direct.wait()
            self._files.sync(self.fd, self.partial)

    def publish(self, *, durable: bool) -> Path:
        """Give the file its name; nothing may follow.

        Args:
            durable: wait until file and name are on the device.

        Raises:
            StorageError: the system refuses. Unless the file has its name by then, it is still
                there to :meth:`abandon` or to leave.
        """
        self.end_direct()
        if durable:
            self.sync_data()
        self._files.rename(self.partial, self.path)
        fd, self.fd = self.fd, -1
        try:
            self._files.close(fd)
        except BaseException:
            self._files.remove(self.path)
            raise
        if durable:
            self._files.sync_folder(self.path.parent)
        return self.path

    def _drop_waiting(self) -> None:
        self._step, self._buffer, self._waiting_bytes = None, None, 0
        self._aside = bytearray()

    def leave(self) -> None:
        """Close the file and leave it as it is; what waits and was not synced is not in it."""
        fd, self.fd = self.fd, -1
        self._drop_waiting()
        try:
            self._end_direct()
        finally:
            if fd >= 0:
                self._files.close(fd)

    def abandon(self) -> None:
        """Remove what was written, unless it was published."""
        self._drop_waiting()
        direct, self._direct = self._direct, None
        fd, self.fd = self.fd, -1
        try:
            if direct is not None:
                direct.close()
        finally:
            if fd >= 0:
                try:
                    self._files.close(fd)
                finally:
                    self._files.remove(self.partial)
