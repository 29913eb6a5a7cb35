"""Bytes of files on their way into the page cache, ahead of whoever reads them mapped.

With the kernel's usual 128 KiB of read-ahead a cold mapping is read at half of a device's speed,
or less (measured): a thread of its own asks for more, earlier.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress

from diskoffload.errors import OffloadError
from diskoffload.store.stored import ShardTensor


class ReadAhead:
    """Asks the kernel for tensors' bytes. Thread-safe.

    Its thread lives only while there is something to ask for. In a forked child it begins anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[ShardTensor] = deque()
        self._is_running = False
        self._pid = os.getpid()

    def begin(self, wanted: list[ShardTensor]) -> None:
        """Ask for tensors, in this order, as far as they are not in the page cache already."""
        if self._pid != os.getpid():  # the thread is the parent's, and so may be the lock
            self._lock, self._pid, self._is_running = threading.Lock(), os.getpid(), False
        with self._lock:
            self._waiting.extend(wanted)
            starts = bool(self._waiting) and not self._is_running
            self._is_running = self._is_running or starts
        if starts:
            threading.Thread(target=self._work, name="diskoffload-ahead", daemon=True).start()

    def forget(self) -> None:
        """Ask for no more of what waits."""
        with self._lock:
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                stored = self._waiting.popleft()
            with suppress(OffloadError):  # whoever reads it is told
                stored.shard.prefetch(stored.spec)
            del stored
