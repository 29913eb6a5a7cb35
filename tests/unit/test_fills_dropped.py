"""What was being read ahead when its owner went: nobody waits for it, and the rest is not read."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from diskoffload.residency.foresight import Foresight
from diskoffload.residency.streaming import Streaming
from diskoffload.store import fills


class HeldUp:
    """A hundred pieces, of which none can be read before ``go``."""

    room_bytes = 4096

    def __init__(self) -> None:
        self.ranges = [(number, number + 1) for number in range(100)]
        self.began = threading.Semaphore(0)
        self.go = threading.Event()
        self.count = 0

    def read(self, start: int, stop: int, buffer: Any, hand: Any) -> None:
        self.count += 1
        self.began.release()
        self.go.wait()

    def finish(self, buffer: Any) -> tuple[int, bytes]:
        return 0, b""


def test_only_the_pieces_in_hand_are_read_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = HeldUp()
    monkeypatch.setattr(fills, "pieces_of", lambda stored: pieces)
    streaming = Streaming("streamed", Foresight())
    stored: Any = object()
    fill = streaming._filling.begin(stored, streaming.buffers)
    for _ in range(fills._READERS):
        assert pieces.began.acquire(timeout=60)
    del streaming
    gc.collect()
    pieces.go.set()
    fill.wait()
    assert pieces.count == fills._READERS
