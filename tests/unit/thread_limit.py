"""A system that has few threads left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def threads_left(count: int) -> Iterator[None]:
    """Let so many more threads be started, and none after them."""
    start, left = threading.Thread.start, [count]

    def limited(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading.Thread, "start", limited)
        yield
