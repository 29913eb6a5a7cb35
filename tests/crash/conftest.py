"""What every crash test needs, and must leave behind: nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from garbage import no_garbage
from nets import write_checkpoint

__all__ = ["no_garbage"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a checkpoint that models are opened from."""
    place = write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")
    yield place
    shutil.rmtree(place.parent)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Give a place that is cleared afterwards, for what is committed stays."""
    place = tmp_path / "root"
    place.mkdir()
    yield place
    shutil.rmtree(place)
