"""Stored tensors on their way into buffers, read past the page cache by threads of their own.

Some threads with pieces of some MiB each keep a device busy at a thirtieth of what mapped reads
cost the processor (measured). Whoever reads a tensor's last piece compares it with its checksum,
where it has one, and marks its memory: the kernel tells later whether it was written to. Where it
does not, a digest is made then and one as it leaves, by the same threads, so that whoever computes
need not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch
import xxhash

from diskoffload.store.buffers import Buffers
from diskoffload.store.lingering import LingeringThreads
from diskoffload.store.pieces import Hand, Pieces, Streamable, pieces_of
from diskoffload.system.memory import Memory
from diskoffload.system.write_watch import Mark, WriteWatch

# Two keep it busy; the kernel clears fresh memory of others meanwhile, which is a tenth of the time
# that a first pass takes (measured).
_READERS = 4
# One more digests what was read and what is to be read over: the device must not wait for that,
# nor that for a piece to be read.
_THREADS = _READERS + 1


class Fill:
    """One tensor on its way into a buffer. Thread-safe.

    Attributes:
        stored: where it comes from.
        buffer: where it goes.
        mark: of the value's memory, once it is there; ``None`` where nothing is or can be marked.
        digest: of the value's bytes, once it is there; empty if none was needed.
    """

    def __init__(
        self,
        stored: Streamable,
        pieces: Pieces,
        buffer: Memory,
        watch: WriteWatch | None,
        *,
        stays: bool,
    ) -> None:
        self.stored = stored
        self.buffer = buffer
        self.mark: Mark | None = None
        self.digest = b""
        self._watch = watch
        self._stays = stays
        self.is_abandoned = False
        self._pieces = pieces
        self._left = len(pieces.ranges)
        self._place = 0
        self._changed = threading.Condition(threading.Lock())
        self._has_ended = self._has_news = False
        self._error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.buffer.nbytes

    def value(self) -> torch.Tensor:
        """Wait for the tensor; give it.

        The tensor aliases the buffer, which must not be used otherwise while it lives.

        Raises:
            DamagedFileError: its bytes are not those that were written.
            StorageError: it could not be read.
        """
        self.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert not self.is_abandoned  # nothing of it was read, perhaps
        stored = self.stored
        return self.buffer.tensor(stored.dtype, stored.shape, self._place)

    def read(self, start: int, stop: int, hand: Hand) -> bool:
        """Read a piece; tell whether it was the last, after which :meth:`finish` is called."""
        try:
            if not self.is_abandoned:
                self._pieces.read(start, stop, self.buffer, hand)
        except BaseException as error:
            self._error = error
        with self._changed:
            self._left -= 1
            return not self._left

    def finish(self) -> None:
        """Make the value of what was read."""
        try:
            if self._error is None and not self.is_abandoned:
                self._finish()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _finish(self) -> None:
        pieces, buffer, nbytes = self._pieces, self.buffer, self.stored.nbytes
        digests = self._stays and self._watch is None
        self._place, self.digest = pieces.finish(buffer, digests=digests, aligns=self._stays)
        if not self._stays:
            return
        if self._watch is not None and nbytes:
            self.mark = self._watch.mark(buffer, self._place, nbytes)
        if not self.digest and self.mark is None:
            self.digest = xxhash.xxh3_128_digest(buffer.view(self._place, nbytes))

    def wait(self) -> None:
        """Wait until nothing of it is read any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended)

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is read any more."""
        return self._has_ended

    def wait_or_wake(self) -> None:
        """Wait until nothing of it is read any more, or :meth:`wake` is called."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or self._has_news)
            self._has_news = False

    def wake(self) -> None:
        """Have who waits for it look what else there is to do."""
        with self._changed:
            self._has_news = True
            self._changed.notify_all()


class Check:
    """The digest of bytes that nobody uses now, made beside whoever computes. Thread-safe.

    Attributes:
        digest: empty until it is known.
    """

    def __init__(self, data: memoryview, when_known: Callable[[], None]) -> None:
        self.digest = b""
        self._when_known = when_known
        self._data: memoryview | None = data

    def cancel(self) -> None:
        """Make no digest any more, unless that has begun: nobody will ask for it."""
        self._data = None

    def run(self) -> None:
        """Make the digest, and tell; the bytes are let go before it is known."""
        data, self._data = self._data, None
        if data is not None:
            digest = xxhash.xxh3_128_digest(data)
            del data
            self.digest = digest
            self._when_known()


class Filling(LingeringThreads):
    """Reads tensors into buffers, and digests buffers. Thread-safe, in a forked child too.

    What is still to be read when it ``is_over`` is abandoned.
    """

    def __init__(self) -> None:
        super().__init__("diskoffload-fill", _THREADS, is_daemon=False)

    def _forget_queued(self) -> None:
        self._pieces: deque[tuple[Fill, int, int]] = deque()
        self._checks: deque[Check] = deque()
        self._reading = 0

    def _count_queued(self) -> int:
        return len(self._pieces) + len(self._checks)

    def _has_work(self) -> bool:
        return bool(self._checks) or (bool(self._pieces) and self._reading < _READERS)

    def begin(self, stored: Streamable, buffers: Buffers, *, stays: bool = True) -> Fill:
        """Begin to read a tensor into one of the buffers; read it, if no thread can be had.

        Args:
            stored: the tensor.
            buffers: where to.
            stays: whether its value stays with somebody who may edit it, and is aligned and
                marked therefore; else it is looked at once.

        Raises:
            StorageError: the system has no memory for it.
        """
        pieces = pieces_of(stored)
        fill = Fill(stored, pieces, buffers.take(pieces.room_bytes), buffers.watch, stays=stays)
        self._check_process()
        with self._changed:
            self._pieces.extend((fill, start, stop) for start, stop in pieces.ranges)
        self._work_on_it()
        return fill

    def check(self, data: memoryview, when_known: Callable[[], None]) -> Check:
        """Begin to digest bytes, before anything else that is still to be read.

        Args:
            data: they must not change until the digest is known or wanted no more.
            when_known: called by the thread that made the digest; must not raise or wait.
        """
        check = Check(data, when_known)
        self._check_process()
        with self._changed:
            self._checks.append(check)
        self._work_on_it()
        return check

    def _work_on_it(self) -> None:
        if not self._have_threads():
            self._drain()

    def _drain(self) -> None:
        hand = Hand()
        while True:
            with self._changed:
                check = self._checks.popleft() if self._checks else None
                reads = check is None and self._has_work()
                piece = self._pieces.popleft() if reads else None
                self._reading += reads
            if check is not None:
                check.run()
            elif piece is not None:
                fill, start, stop = piece
                if self.is_over:
                    fill.is_abandoned = True
                is_last = fill.read(start, stop, hand)
                with self._changed:
                    self._reading -= 1
                    if self._pieces:
                        self._changed.notify()  # the device does not wait for what is left to do
                if is_last:
                    fill.finish()
                del fill
            else:
                return
            del check, piece
