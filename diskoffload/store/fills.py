"""Stored tensors on their way into buffers, read past the page cache by threads of their own.

Two threads with pieces of some MiB each keep a device busy at a thirtieth of what mapped reads
cost the processor (measured). A tensor is digested by whoever reads its last piece: that is
compared with its checksum, where it has one, and later tells whether it was edited.
"""

from __future__ import annotations

import os
import threading
from collections import deque

import torch

from diskoffload.store.buffers import Buffers
from diskoffload.store.pieces import Hand, Pieces, Streamable, pieces_of
from diskoffload.system.memory import Memory

_THREADS = 2


class Fill:
    """One tensor on its way into a buffer. Thread-safe.

    Attributes:
        stored: where it comes from.
        buffer: where it goes.
    """

    def __init__(self, stored: Streamable, pieces: Pieces, buffer: Memory) -> None:
        self.stored = stored
        self.buffer = buffer
        self.is_abandoned = False
        self._pieces = pieces
        self._left = len(pieces.ranges)
        self._place = 0
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
        tensor = self.buffer.tensor(stored.dtype, stored.shape, self._place)
        return tensor, self._digest

    def read(self, start: int, stop: int, hand: Hand) -> None:
        """Read a piece; the last one makes the value."""
        try:
            if not self.is_abandoned:
                self._pieces.read(start, stop, self.buffer, hand)
        except BaseException as error:
            self._error = error
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            try:
                if self._error is None and not self.is_abandoned:
                    self._place, self._digest = self._pieces.finish(self.buffer)
            except BaseException as error:
                self._error = error
            self._ended.set()

    def wait(self) -> None:
        """Wait until nothing of it is read any more."""
        self._ended.wait()


class Filling:
    """Reads tensors into buffers. Thread-safe.

    Its threads live only while there is something to read. In a forked child it begins anew.

    Attributes:
        is_over: nobody waits for what is still to be read, so it is not. May be set from a
            finalizer: it takes no lock.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._lock = threading.Lock()
        self._pieces: deque[tuple[Fill, int, int]] = deque()
        self._running = 0
        self._pid = os.getpid()

    def begin(self, stored: Streamable, buffers: Buffers) -> Fill:
        """Begin to read a tensor into one of the buffers; read it, if no thread can be had.

        Raises:
            StorageError: the system has no memory for it.
        """
        pieces = pieces_of(stored)
        fill = Fill(stored, pieces, buffers.take(pieces.room_bytes))
        with self._lock:
            if self._pid != os.getpid():
                self._pieces.clear()
                self._running, self._pid = 0, os.getpid()
            self._pieces.extend((fill, start, stop) for start, stop in pieces.ranges)
            wanted = min(_THREADS, len(self._pieces)) - self._running
            self._running += max(0, wanted)
        for missing in range(wanted, 0, -1):
            try:
                threading.Thread(target=self._work, name="diskoffload-fill").start()
            except RuntimeError:  # the system has none left
                with self._lock:
                    self._running -= missing - 1
                self._work()
                break
        return fill

    def _work(self) -> None:
        hand = Hand()
        while True:
            with self._lock:
                if not self._pieces:
                    self._running -= 1
                    return
                fill, start, stop = self._pieces.popleft()
            if self.is_over:
                fill.is_abandoned = True
            fill.read(start, stop, hand)
            del fill
