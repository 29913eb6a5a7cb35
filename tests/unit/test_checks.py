"""Digests that are made beside whoever computes."""

from __future__ import annotations

import threading
import time

import pytest
import xxhash

from diskoffload.store import fills, lingering
from diskoffload.store.fills import Check, Filling
from diskoffload.system.memory import anonymous


def test_a_digest_is_known_and_told_when_the_bytes_are_let_go() -> None:
    memory, begun, told = anonymous(1 << 20), threading.Event(), threading.Semaphore(0)
    was_used: list[bool] = []

    def tell() -> None:
        begun.wait(60)  # who asked has let go of the bytes as well
        was_used.append(memory.is_used())
        told.release()

    check = Filling().check(memory.view(), tell)
    begun.set()
    assert told.acquire(timeout=60)
    assert check.digest == xxhash.xxh3_128_digest(bytes(1 << 20))
    assert was_used == [False]


def test_a_cancelled_one_is_neither_made_nor_told() -> None:
    told: list[int] = []
    check = Check(memoryview(b"abc"), lambda: told.append(1))
    check.cancel()
    check.run()
    assert (check.digest, told) == (b"", [])


def test_one_that_raises_does_not_take_a_thread_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    filling, told = Filling(), threading.Semaphore(0)

    def fail() -> None:
        raise AssertionError

    for _ in range(2 * fills._THREADS):
        check = filling.check(memoryview(b"a"), fail)
        until_seconds = time.monotonic() + 10
        while not check.digest and time.monotonic() < until_seconds:
            time.sleep(0.001)
    filling.check(memoryview(b"b"), lambda: told.release())
    assert told.acquire(timeout=60)


def test_threads_are_used_again_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", counted)
    monkeypatch.setattr(lingering, "_LINGER_SECONDS", 5.0)
    filling, told = Filling(), threading.Semaphore(0)
    for _ in range(50):
        filling.check(memoryview(b"a"), lambda: told.release())
        assert told.acquire(timeout=60)
    assert len(begun) <= fills._THREADS
    monkeypatch.setattr(lingering, "_LINGER_SECONDS", 0.0)
    filling.is_over = True
    with filling._changed:
        filling._changed.notify_all()
    for thread in begun:
        thread.join(timeout=60)
        assert not thread.is_alive()
