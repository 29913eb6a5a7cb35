"""A model held in each of the ways; and what every contract test must leave behind: nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from garbage import no_garbage
from ways import SLOW_WAYS, WAYS, Net, hold, make_net

from diskoffload.residency.resident import default_residency

__all__ = ["no_garbage"]


@pytest.fixture(autouse=True)
def the_process_s_own_budget() -> Iterator[None]:
    """Some set the budget of the books that all models of the process share."""
    before = default_residency.max_bytes
    yield
    default_residency.max_bytes = before


@pytest.fixture(
    params=[pytest.param(way, marks=pytest.mark.slow) if way in SLOW_WAYS else way for way in WAYS]
)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(way: str, tmp_path: Path) -> Net:
    return hold(make_net(), way, tmp_path)
