"""Memory that a value's packed chunks are put into, and that the next value's use again."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from diskoffload.store.buffers import Buffers
from diskoffload.store.workspace import Bytes
from diskoffload.system.memory import Memory

_SEGMENT_BYTES = 8 << 20
# Below this the C library's own memory is as quick, and it is given back as soon.
_FROM_SYSTEM_BYTES = 1 << 20


class Room:
    """Memory that chunks are put into one after the other, as they come. Thread-safe.

    Taken in segments, from the system: bytes objects made in threads cost as much as the
    packing, and the C library keeps what they leave.
    """

    def __init__(self, most_bytes: int, spare: Buffers) -> None:
        """Start with nothing.

        Args:
            most_bytes: the room that there is.
            spare: where memory is taken from, and goes when it is given back.
        """
        self.is_exceeded = False
        self._left_bytes = most_bytes
        self._spare = spare
        self._taken: list[Memory] = []
        self._segment: Bytes = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def put(self, parts: Sequence[memoryview]) -> memoryview:
        """Copy a chunk's parts; give them together, or nothing if there is not the room.

        Raises:
            StorageError: the system has no memory for it.
        """
        nbytes = sum(map(len, parts))
        with self._lock:
            if nbytes > self._left_bytes:
                self.is_exceeded = True
                return memoryview(b"")
            if nbytes > len(self._segment):
                self._segment = self._more(nbytes)
            place, self._segment = self._segment[:nbytes], self._segment[nbytes:]
            self._left_bytes -= nbytes
        begin = 0
        for part in parts:
            np.copyto(place[begin : begin + len(part)], np.frombuffer(part, np.uint8))
            begin += len(part)
        return place.data.toreadonly()

    def give_back(self) -> None:
        """Let the memory be used again, but for segments that a chunk is still referred to in.

        Nothing can be put afterwards.
        """
        with self._lock:
            self._left_bytes, self._segment = 0, np.empty(0, np.uint8)
            taken, self._taken = self._taken, []
        while taken:
            self._spare.give(taken.pop())

    def _more(self, nbytes: int) -> Bytes:
        size_bytes = max(nbytes, min(self._left_bytes, _SEGMENT_BYTES))
        if size_bytes < _FROM_SYSTEM_BYTES:
            return np.empty(size_bytes, np.uint8)
        memory = self._spare.take(size_bytes)
        self._taken.append(memory)
        return np.frombuffer(memory.view(), np.uint8)
