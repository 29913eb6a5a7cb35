"""What the fault tests share: small file systems, and a folder that others may enter."""

from __future__ import annotations

import gc
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount small file systems in memory; it takes root to make one."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"small-{len(places)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode != 0:
            pytest.skip(f"no small file system can be mounted: {done.stderr.decode().strip()}")
        places.append(place)
        return place

    yield mount
    gc.collect()
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """Give a folder that anybody may write to; pytest's own let nobody else in."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o777)
    yield folder
    gc.collect()
    shutil.rmtree(folder)
