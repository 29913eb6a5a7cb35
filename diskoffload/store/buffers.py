"""Memory that is used again: getting it anew costs more than reading a disk into it.

Filling fresh memory ran at 1.3 GB/s, filling huge pages again at 4.2 (measured), because the
kernel clears every page that it gives. So buffers are kept, as many as there were in use.
"""

from __future__ import annotations

import threading
from collections import defaultdict

from diskoffload.system.memory import Memory, anonymous
from diskoffload.system.write_watch import WriteWatch

# Sizes are rounded up, so that tensors of nearly the same size share buffers: at most a part in
# 64 is wasted, and of an untouched rest nothing is ever taken from the system.
_GRAIN = 64
_LEAST_GRAIN_BYTES = 64 << 10


class Buffers:
    """Buffers that nobody uses now. Thread-safe.

    Attributes:
        watch: tells what was written to them, if the kernel does.
    """

    def __init__(self, watch: WriteWatch | None = None) -> None:
        self.watch = watch
        self._lock = threading.Lock()
        self._free: defaultdict[int, list[Memory]] = defaultdict(list)
        self._free_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of buffers that wait for their next use."""
        return self._free_bytes

    def take(self, nbytes: int) -> Memory:
        """Give a buffer of at least so many bytes, with anything in it.

        Raises:
            StorageError: the system has no memory.
        """
        size_bytes = buffer_size_bytes(nbytes)
        memory = None
        with self._lock:
            same = self._free.get(size_bytes)
            if same:
                self._free_bytes -= size_bytes
                memory = same.pop()
        if memory is None:
            memory = anonymous(size_bytes)
            if self.watch is not None:
                self.watch.watch(memory)
        elif self.watch is not None:
            self.watch.open(memory)
        return memory

    def give(self, memory: Memory) -> None:
        """Take a buffer back, unless something still refers to it: then it is theirs."""
        if memory.is_used():
            return
        with self._lock:
            self._free[memory.nbytes].append(memory)
            self._free_bytes += memory.nbytes

    def shrink(self, most_bytes: int, *, spare_bytes: int = 0) -> None:
        """Give memory back to the system until no more than this waits.

        Args:
            most_bytes: what may wait.
            spare_bytes: a buffer for a tensor of so many bytes may wait beside it: the next use.
        """
        with self._lock:
            spare = self._free.get(buffer_size_bytes(spare_bytes)) if spare_bytes else None
            if spare:
                most_bytes += spare[0].nbytes
            for size_bytes in sorted(self._free, reverse=True):
                waiting = self._free[size_bytes]
                while len(waiting) > (waiting is spare) and self._free_bytes > most_bytes:
                    waiting.pop()
                    self._free_bytes -= size_bytes


def buffer_size_bytes(nbytes: int) -> int:
    """Tell how large a buffer for a tensor of so many bytes is."""
    grain = max(_LEAST_GRAIN_BYTES, 1 << max(0, nbytes.bit_length() - _GRAIN.bit_length()))
    return -(-nbytes // grain) * grain
