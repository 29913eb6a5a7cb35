"""The garbage collector, while thousands of objects are made that are all to stay."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pauses:
    """Who wants the collector to pause; it is one for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._was_enabled = False

    def begin(self) -> None:
        with self._lock:
            if not self._count:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def end(self, *, all_stays: bool) -> None:
        with self._lock:
            self._count -= 1
            if not self._count and self._was_enabled:
                if all_stays:
                    self._count_as_old()
                gc.enable()

    @staticmethod
    def _count_as_old() -> None:
        """Have what was made meanwhile looked through with all that is old, not by itself first.

        What somebody has frozen would be thawed with it.
        """
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()


_pauses = _Pauses()


@contextmanager
def collector_paused(*, all_stays: bool = False) -> Iterator[None]:
    """Have Python look for no cycles meanwhile, in any thread.

    It looks through everything there is, again and again as more is made: half of the time that
    opening a model of 20,000 tensors took (measured). Afterwards it is as it was before.

    Args:
        all_stays: what was made is a model that will be there for long, so it is counted as old
            at once. Not for what is done again and again: garbage of others that is young is
            counted so too, and lives until all that is old is looked through.
    """
    _pauses.begin()
    try:
        yield
    finally:
        _pauses.end(all_stays=all_stays)
