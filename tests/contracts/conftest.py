"""What every contract test must leave behind: nothing."""

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
    _check(tmp_path, threads)


def _check(tmp_path: Path, threads: set[threading.Thread]) -> None:
    gc.collect()
    left = [str(path) for path in tmp_path.rglob("diskoffload*")]
    assert not left, f"files were left: {left}"
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = [line for line in maps if str(tmp_path) in line]
    assert not mapped, f"mappings were left: {mapped}"
    open_files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            open_files.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    assert not [name for name in open_files if str(tmp_path) in name]
    assert not [one for one in threading.enumerate() if one not in threads]
