"""What several test files need: our tools, a real control group, room on a real disk."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The tools are scripts: they find each other by the folder they lie in.
sys.path.insert(0, str(ROOT / "tools"))

from cgroup import MemoryCgroup, memory_cgroup, why_not  # noqa: E402

from diskoffload.system.files import memory_file_system  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Keep the collector from looking at all of torch's objects again in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cgroup_refusal() -> str | None:
    """Why no memory control group can be made here; ``None`` where one can."""
    return why_not()


@pytest.fixture
def real_cgroup(
    cgroup_refusal: str | None,
) -> Callable[[int], AbstractContextManager[MemoryCgroup]]:
    """Make a real memory control group of so many bytes; skips where that is forbidden."""
    if cgroup_refusal is not None:
        pytest.skip(f"no memory control group here: {cgroup_refusal}")
    return memory_cgroup


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[Path]:
    """Give a folder on a real disk; removed at once afterwards, for its files are large."""
    in_memory = memory_file_system(tmp_path)
    if in_memory:
        pytest.skip(f"{tmp_path} is on {in_memory}, which is memory; point --basetemp at a disk")
    yield tmp_path
    shutil.rmtree(tmp_path)
