"""Work that is shared by a few threads, which end with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from diskoffload.system.processors import processor_count

# More would take the processor from whoever computes meanwhile, and the decoder outruns
# most disks with two.
_MOST_THREADS = 4


def threads_for(count: int) -> int:
    """Tell how many threads should share so many pieces of work."""
    return max(1, min(count, processor_count(), _MOST_THREADS))


class _Numbers:
    """Gives every number below a bound to one of its askers. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._next, self._count = 0, count
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            if self._next >= self._count:
                raise StopIteration
            self._next += 1
            return self._next - 1

    def stop(self) -> None:
        with self._lock:
            self._count = 0


def share(count: int, work: Callable[[Iterator[int]], None]) -> None:
    """Have a few threads, this one among them, work on the numbers below ``count``.

    Every thread calls ``work`` once, with an iterator that gives each number to one of them,
    in order. When one fails the others stop at their next number; the first error is raised
    here when all have ended. For a single number no thread is started. Nothing is left
    behind, so it works in a forked child as it does in its parent.
    """
    numbers = _Numbers(count)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(numbers)
        except BaseException as error:
            numbers.stop()
            errors.append(error)

    helpers = []
    for _ in range(threads_for(count) - 1):
        thread = threading.Thread(target=run, name="diskoffload-codec")
        try:
            thread.start()
        except RuntimeError:  # the system gives no more, or the interpreter is ending
            break
        helpers.append(thread)
    try:
        run()
        for thread in helpers:
            thread.join()
        if errors:
            raise errors[0]
    except BaseException:
        numbers.stop()  # an interrupt came while we waited
        raise
    finally:
        errors.clear()  # else its own traceback keeps the error, and what it refers to
