"""What the unit tests share: a guard against leaked descriptors and threads."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from writer_bench import MIB, Bench

from diskoffload.system.files import Files

_PATIENCE_SECONDS = 3.0


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except OSError:
            continue  # the one that listed the folder
    return found


@pytest.fixture(scope="session")
def _quick_collection() -> None:
    # What the imports made is not looked through at every collection.
    gc.collect()
    gc.freeze()


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest, _quick_collection: None) -> Iterator[None]:
    """Fail a test after which a descriptor is open, or a Python thread runs, that was not."""
    if not Path("/proc/self/fd").is_dir():
        yield
        return
    gc.collect()
    descriptors, threads = _descriptors(), set(threading.enumerate())
    yield
    if request.node.stash.get(_failed, False):
        return  # its traceback keeps alive what it held
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        gc.collect()
        leaked = sorted(set(_descriptors().items()) - set(descriptors.items()))
        running = [one.name for one in threading.enumerate() if one not in threads]
        if not leaked and not running:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left open: descriptors {leaked}, threads {running}")
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 1 MiB; it takes root to make one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def one(group_bytes: int = MIB, files: Files | None = None, folder: Path = tmp_path) -> Bench:
        made.append(Bench(folder, group_bytes, files))
        return made[-1]

    yield one
    for bench in made:
        bench.writer.close()
        bench.shards.clear()  # pytest keeps the fixture for longer


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()
