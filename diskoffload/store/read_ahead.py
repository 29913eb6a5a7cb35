"""Bytes of files on their way into the page cache, ahead of whoever reads them mapped.

With the kernel's usual 128 KiB of read-ahead a cold mapping is read at half of a device's speed,
or less (measured): a thread of its own has them read earlier, in huge pages where there are such.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TypeVar

from diskoffload.errors import OffloadError
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import StoredSpec
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import HUGE_PAGE_BYTES

# One that waits for its huge page has the others' on their way meanwhile.
_THREADS = 4
_PIECE_BYTES = 2 * HUGE_PAGE_BYTES
# So much is asked for before it is needed: it lasts while a few tensors are computed with or
# written, and a container of half a GB holds it beside them.
_AHEAD_BYTES = 64 << 20
# A thread without work waits so long for more: to begin one for each tensor costs more than to read
# a small one.
_LINGER_SECONDS = 0.05

_Item = TypeVar("_Item")


class ReadAhead:
    """Has the kernel read tensors' bytes. Thread-safe.

    Its threads live only while there is something to ask for, and a moment longer. In a forked
    child it begins anew.

    Attributes:
        is_over: nobody waits for what is still to be read, so it is not. May be set from a
            finalizer: it takes no lock.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[tuple[ShardTensor | EncodedTensor, int, int]] = deque()
        self._running = self._idle = 0
        self._pid = os.getpid()

    def begin(self, wanted: Sequence[ShardTensor | EncodedTensor]) -> None:
        """Ask for tensors, in this order, as far as they are not in the page cache already."""
        if self._pid != os.getpid():  # the threads are the parent's, and so may be the lock
            self._begin_anew()
        with self._changed:
            for stored in wanted:
                self._waiting.extend((stored, *part) for part in _pieces(stored.spec))
            queued = len(self._waiting)
            self._changed.notify(queued)
            starting = max(0, min(_THREADS - self._running, queued - self._idle))
            self._running += starting
        for missing in range(starting, 0, -1):
            try:
                threading.Thread(target=self._work, name="diskoffload-ahead", daemon=True).start()
            except RuntimeError:  # the system has none left, and it is only a hint
                with self._changed:
                    self._running -= missing
                break

    def through(
        self,
        items: Iterable[_Item],
        reads: Callable[[_Item], Sequence[ShardTensor | EncodedTensor]],
    ) -> Iterator[_Item]:
        """Give items one after the other, having asked for what those after them read.

        Args:
            items: in the order in which they are needed.
            reads: tells the tensors that one reads, at a time when those before it may be yet to
                come.
        """
        coming: deque[tuple[_Item, int]] = deque()
        ahead_bytes = 0
        for item in items:
            wanted = reads(item)
            if wanted:
                self.begin(wanted)
            coming.append((item, sum(one.spec.nbytes for one in wanted)))
            ahead_bytes += coming[-1][1]
            while coming and ahead_bytes - coming[0][1] >= _AHEAD_BYTES:
                due, nbytes = coming.popleft()
                ahead_bytes -= nbytes
                yield due
        for due, _ in coming:
            yield due

    def forget(self) -> None:
        """Ask for no more of what waits."""
        if self._pid != os.getpid():
            self._begin_anew()
        with self._changed:
            self._waiting.clear()

    def _work(self) -> None:
        try:
            self._drain()
        except BaseException:  # else nobody would be begun in its place
            with self._changed:
                self._running -= 1
            raise

    def _drain(self) -> None:
        while True:
            with self._changed:
                if self.is_over:
                    self._waiting.clear()
                elif not self._waiting:
                    self._idle += 1
                    self._changed.wait_for(lambda: bool(self._waiting), _LINGER_SECONDS)
                    self._idle -= 1
                if not self._waiting:
                    self._running -= 1
                    return
                stored, start, stop = self._waiting.popleft()
            with suppress(OffloadError):  # whoever reads it is told
                stored.shard.populate(stored.spec, start, stop)
            del stored


def _pieces(spec: StoredSpec) -> list[tuple[int, int]]:
    """Cut a tensor where huge pages of its file begin."""
    first = -spec.offset % HUGE_PAGE_BYTES
    return list(
        pairwise([0, *range(first or _PIECE_BYTES, spec.nbytes, _PIECE_BYTES), spec.nbytes])
    )
