"""A model held in each of the ways; and what every contract test must leave behind: nothing."""

from pathlib import Path

import pytest
from garbage import no_garbage
from ways import WAYS, Net, hold, make_net

__all__ = ["no_garbage"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(way: str, tmp_path: Path) -> Net:
    return hold(make_net(), way, tmp_path)
