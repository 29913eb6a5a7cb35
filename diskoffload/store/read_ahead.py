"""Bytes of files on their way into the page cache, ahead of whoever reads them mapped.

With the kernel's usual 128 KiB of read-ahead a cold mapping is read at half of a device's speed,
or less (measured): a thread of its own has them read earlier, in huge pages where there are such.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TypeVar

from diskoffload.errors import OffloadError
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import StoredSpec
from diskoffload.store.lingering import LingeringThreads
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import HUGE_PAGE_BYTES

# One that waits for its huge page has the others' on their way meanwhile.
_THREADS = 4
_PIECE_BYTES = 2 * HUGE_PAGE_BYTES
# So much is asked for before it is needed: it lasts while a few tensors are computed with or
# written, and a container of half a GB holds it beside them.
_AHEAD_BYTES = 64 << 20

_Item = TypeVar("_Item")


class ReadAhead(LingeringThreads):
    """Has the kernel read tensors' bytes. Thread-safe, in a forked child too.

    What is still to be read when it ``is_over`` is not. It is only a hint: where the system has no
    thread left, nothing is read.
    """

    def __init__(self) -> None:
        super().__init__("diskoffload-ahead", _THREADS, is_daemon=True)

    def _forget_queued(self) -> None:
        self._waiting: deque[tuple[ShardTensor | EncodedTensor, int, int]] = deque()

    def _count_queued(self) -> int:
        return len(self._waiting)

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def begin(self, wanted: Sequence[ShardTensor | EncodedTensor]) -> None:
        """Ask for tensors, in this order, as far as they are not in the page cache already."""
        self._check_process()
        with self._changed:
            for stored in wanted:
                self._waiting.extend((stored, *part) for part in _pieces(stored.spec))
        self._have_threads()

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
        self._check_process()
        with self._changed:
            self._waiting.clear()

    def _drain(self) -> None:
        while True:
            with self._changed:
                if self.is_over:
                    self._waiting.clear()
                if not self._waiting:
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
