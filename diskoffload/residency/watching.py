"""A thread that looks at memory now and then, while there is something to give back."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

# A process that takes memory as fast as the kernel can clear it takes some 500 MiB meanwhile;
# a look costs 0.3 ms (see Headroom).
EVERY_SECONDS = 0.1


class Watching:
    """Looks as long as looking says that there is something to watch. Thread-safe.

    Its thread goes with it, at the interpreter's end, and when there is nothing left. In a
    forked child it begins anew.
    """

    def __init__(self, look: Callable[[], bool], every_seconds: float = EVERY_SECONDS) -> None:
        """Begin when :meth:`wake` is called.

        Args:
            look: does what is to be done, and tells whether to go on.
            every_seconds: how often.
        """
        self._run = _Run(look, every_seconds)
        weakref.finalize(self, self._run.end)

    def wake(self) -> None:
        """Look from now on."""
        self._run.begin()


class _Run:
    def __init__(self, look: Callable[[], bool], every_seconds: float) -> None:
        self._look, self._every_seconds = look, every_seconds
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()

    def begin(self) -> None:
        if self._pid != os.getpid():
            # The thread is the parent's, and so may be whoever holds the lock.
            self._lock, self._thread, self._pid = threading.Lock(), None, os.getpid()
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                self._ends = threading.Event()
                self._thread = threading.Thread(
                    target=self._watch, args=(self._ends,), name="diskoffload-watch", daemon=True
                )
                self._thread.start()

    def _watch(self, ends: threading.Event) -> None:
        while not ends.wait(self._every_seconds):
            if not self._look():
                self._thread = None
                if self._look():  # whoever came meanwhile saw a thread
                    self.begin()
                return

    def end(self) -> None:
        thread = self._thread
        if thread is None or self._pid != os.getpid():
            return
        self._ends.set()
        if thread is not threading.current_thread():  # the collector may end us in our own
            thread.join()
