"""Checkpoints that several tests read and none may change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from models import FAMILIES, digests, save_model


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Give one checkpoint a family; at the end, check that no byte of them changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {family: save_model(family, root / family) for family in FAMILIES}
    before = digests(root)
    yield folders
    assert digests(root) == before


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(family: str, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[family]
