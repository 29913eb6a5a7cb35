"""Stored tensors on their way into buffers, read past the page cache by threads of their own.

Two threads with pieces of some MiB each keep a device busy at a thirtieth of what mapped reads
cost the processor (measured). A tensor is digested by whoever reads its last piece: that is
compared with its checksum, where it has one, and later tells whether it was edited.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque

import torch
import xxhash

from diskoffload.store.buffers import Buffers
from diskoffload.store.digests import Checking
from diskoffload.store.header import ALIGNMENT_BYTES
from diskoffload.store.shard import buffer_bytes
from diskoffload.store.stored import ShardTensor
from diskoffload.system.files import BLOCK_BYTES
from diskoffload.system.memory import Memory

_THREADS = 2
_PIECE_BYTES = 16 << 20
assert _PIECE_BYTES % BLOCK_BYTES == 0


class Fill:
    """One tensor on its way into a buffer. Thread-safe.

    Attributes:
        stored: where it comes from.
        buffer: where it goes.
    """

    def __init__(self, stored: ShardTensor, buffer: Memory, pieces: int) -> None:
        self.stored = stored
        self.buffer = buffer
        self.is_abandoned = False
        self._left = pieces
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._digest = b""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.buffer.nbytes

    def value(self) -> tuple[torch.Tensor, bytes]:
        """Wait for the tensor; give it, and the digest of its bytes.

        The tensor aliases the buffer, which must not be used otherwise while it lives.

        Raises:
            DamagedFileError: its bytes are not those that were written.
            StorageError: it could not be read.
        """
        self._ended.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        stored = self.stored
        tensor = self.buffer.tensor(stored.dtype, stored.shape, _place(stored))
        return tensor, self._digest

    def read(self, start: int, stop: int) -> None:
        """Read a piece; the last one makes the value."""
        try:
            if not self.is_abandoned:
                shard, spec = self.stored.shard, self.stored.spec
                shard.read_past_cache(spec, start, stop, self.buffer)
        except BaseException as error:
            self._error = error
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            try:
                if self._error is None and not self.is_abandoned:
                    self._finish()
            except BaseException as error:
                self._error = error
            self._ended.set()

    def _finish(self) -> None:
        stored, spec = self.stored, self.stored.spec
        begin, wanted = spec.offset % BLOCK_BYTES, _place(stored)
        if begin != wanted:  # sums of misaligned tensors may differ in their last bits
            self.buffer.move(begin, wanted, spec.nbytes)
        self._digest = xxhash.xxh3_128_digest(self.buffer.view(wanted, spec.nbytes))
        check = Checking(str(stored.shard.path), spec.name, spec.offset, stored.digest)
        check.compare(self._digest.hex())

    def wait(self) -> None:
        """Wait until nothing of it is read any more."""
        self._ended.wait()


def _place(stored: ShardTensor) -> int:
    """Give where in its buffer a tensor lies in the end: aligned, whatever its file does."""
    place = stored.spec.offset % BLOCK_BYTES
    return place - place % ALIGNMENT_BYTES


class Filling:
    """Reads tensors into buffers. Thread-safe.

    Its threads live only while there is something to read. In a forked child it begins anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: deque[tuple[Fill, int, int]] = deque()
        self._running = 0
        self._pid = os.getpid()

    def begin(self, stored: ShardTensor, buffers: Buffers) -> Fill:
        """Begin to read a tensor into one of the buffers.

        Raises:
            StorageError: the system has no memory for it, or no thread.
        """
        spec = stored.spec
        first_bytes = _PIECE_BYTES - spec.offset % BLOCK_BYTES
        edges = [0, *range(first_bytes, spec.nbytes, _PIECE_BYTES), spec.nbytes]
        fill = Fill(stored, buffers.take(buffer_bytes(spec)), len(edges) - 1)
        with self._lock:
            if self._pid != os.getpid():
                self._pieces.clear()
                self._running, self._pid = 0, os.getpid()
            self._pieces.extend((fill, start, stop) for start, stop in itertools.pairwise(edges))
            wanted = min(_THREADS, len(self._pieces)) - self._running
            self._running += max(0, wanted)
        for _ in range(wanted):
            threading.Thread(target=self._work, name="diskoffload-fill").start()
        return fill

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._pieces:
                    self._running -= 1
                    return
                fill, start, stop = self._pieces.popleft()
            fill.read(start, stop)
            del fill
