"""A model held in each of the ways; and what every contract test must leave behind: nothing."""

from pathlib import Path

import pytest
from garbage import no_garbage
from ways import SLOW_WAYS, WAYS, Net, hold, make_net

__all__ = ["no_garbage"]


@pytest.fixture(
    params=[pytest.param(way, marks=pytest.mark.slow) if way in SLOW_WAYS else way for way in WAYS]
)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(way: str, tmp_path: Path) -> Net:
    return hold(make_net(), way, tmp_path)
