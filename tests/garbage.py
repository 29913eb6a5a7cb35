"""What a test must leave behind: nothing. The folders of tests share this one check."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_garbage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a file, a mapping, a descriptor or a thread."""
    gc.collect()
    threads = set(threading.enumerate())
    yield
    request.node.funcargs.clear()  # pytest itself would keep the model alive
    check_no_garbage(tmp_path, threads)


def check_no_garbage(folder: Path, threads: set[threading.Thread]) -> None:
    """Find what is left of ours in a folder, and the threads that were not there before."""
    gc.collect()
    left = [str(path) for path in folder.rglob("diskoffload*")]
    assert not left, f"files were left: {left[:5]}"
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = [line for line in maps if str(folder) in line]
    assert not mapped, f"mappings were left: {mapped[:5]}"
    open_files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            open_files.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    assert not [name for name in open_files if str(folder) in name]
    assert not [one for one in threading.enumerate() if one not in threads]
