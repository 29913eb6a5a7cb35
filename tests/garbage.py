"""What a test must leave behind: nothing. The folders of tests share this one check."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_END_SECONDS = 5.0


@pytest.fixture(autouse=True)
def no_garbage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a file, a mapping, a descriptor or a thread."""
    gc.collect()
    threads = set(threading.enumerate())
    yield
    if request.node.funcargs:
        request.node.funcargs.clear()  # pytest itself would keep the model alive
    check_no_garbage(tmp_path, threads)


def check_no_garbage(folder: Path, threads: set[threading.Thread]) -> None:
    """Find what is left of ours in a folder, and the threads that were not there before."""
    gc.collect()
    if _left(folder, threads):
        gc.collect()  # a tensor that another tensor keeps alive is found at the second time
    until_seconds = time.monotonic() + _END_SECONDS
    while _ending(threads) and time.monotonic() < until_seconds:
        time.sleep(0.01)
        if not _ending(threads):
            gc.collect()  # what the thread had in hand
    left = _left(folder, threads)
    assert not left, f"left behind: {left[:5]} and {len(left[5:])} more"


def _ending(threads: set[threading.Thread]) -> bool:
    """Whether a thread is there that ends by itself, once it gets the processor.

    One watches memory that the process's own books hold; others read a last piece ahead, and
    hold the file they read meanwhile: whoever drops a model does not wait for that.
    """
    new = [one for one in threading.enumerate() if one not in threads]
    ending = ("diskoffload-watch", "diskoffload-fill", "diskoffload-ahead")
    return any(one.name in ending for one in new)


def _left(folder: Path, threads: set[threading.Thread]) -> list[str]:
    # Not rglob, which raises when a folder goes meanwhile: whoever ends removes its own.
    found = [
        os.path.join(place, name)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if name.startswith("diskoffload")
    ]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found += [line for line in maps if str(folder) in line]
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if str(folder) in name:
            found.append(name)
    return found + [one.name for one in threading.enumerate() if one not in threads]
