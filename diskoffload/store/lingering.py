"""Threads that work on a queue and stay a moment longer, for what is queued next."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod

# A thread without work waits so long for more: beginning one for each tensor costs more than
# the reads of small ones, and one that stays would outlive its model.
_LINGER_SECONDS = 0.05


class LingeringThreads(ABC):
    """A queue, which a derived class keeps, and the threads that work on it. Thread-safe.

    They live only while there is something to do, and a moment longer. In a forked child, whose
    parent's threads are not there and whose parent's lock may never be released, it begins anew:
    a method that queues something calls :meth:`_check_process` first, then adds to the queue
    holding ``_changed``, then calls :meth:`_have_threads`.

    Attributes:
        is_over: nobody waits for what is still queued. May be set from a finalizer: it takes no
            lock.
    """

    def __init__(self, name: str, most_threads: int, *, is_daemon: bool) -> None:
        """Begin without threads.

        Args:
            name: of the threads.
            most_threads: how many there are at most.
            is_daemon: whether the interpreter may end while they work.
        """
        self.is_over = False
        self._name = name
        self._most_threads = most_threads
        self._is_daemon = is_daemon
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._running = self._idle = 0
        self._pid = os.getpid()
        self._forget_queued()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            self._begin_anew()

    @abstractmethod
    def _forget_queued(self) -> None:
        """Make the queue an empty one."""

    @abstractmethod
    def _count_queued(self) -> int:
        """Tell how much is queued; ``_changed`` is held."""

    @abstractmethod
    def _has_work(self) -> bool:
        """Tell whether a thread that asks now would have something to do; ``_changed`` is held."""

    @abstractmethod
    def _drain(self) -> None:
        """Do what is queued until there is nothing for this thread to do."""

    def _have_threads(self) -> bool:
        """See to it that threads work on what is queued; tell whether there is any thread."""
        with self._changed:
            queued = self._count_queued()
            self._changed.notify(queued)
            starting = max(0, min(self._most_threads - self._running, queued - self._idle))
            self._running += starting
        for missing in range(starting, 0, -1):
            thread = threading.Thread(target=self._work, name=self._name, daemon=self._is_daemon)
            try:
                thread.start()
            except RuntimeError:  # the system has none left
                with self._changed:
                    self._running -= missing
                    return self._running > 0
        return True

    def _work(self) -> None:
        try:
            self._drain()
            while self._stays():
                self._drain()
        except BaseException:  # else nobody would be begun in its place
            with self._changed:
                self._running -= 1
            raise

    def _stays(self) -> bool:
        """Wait a moment for more to do; tell whether there is, else the thread counts no more."""
        with self._changed:
            if not self._has_work() and not self.is_over:
                self._idle += 1
                self._changed.wait_for(self._has_work, _LINGER_SECONDS)
                self._idle -= 1
            if self._has_work():
                return True
            self._running -= 1
            return False
