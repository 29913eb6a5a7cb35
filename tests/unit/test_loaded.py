"""The books of what is in memory: their sum is right whatever comes, goes or ends."""

from __future__ import annotations

import gc

from diskoffload.residency.held import Held
from diskoffload.residency.loaded import Loaded


def test_the_sum_follows_every_change() -> None:
    loaded, held, other = Loaded(), Held("a", None), Held("b", None)
    loaded[held] = 3
    loaded[other] = 4
    assert (loaded.nbytes, len(loaded), list(loaded)) == (7, 2, [held, other])
    loaded[held] = 5
    assert (loaded.nbytes, loaded[held], list(loaded)) == (9, 5, [held, other])
    assert loaded.pop(other) == 4
    assert loaded.pop(other, None) is None
    assert (loaded.nbytes, list(loaded)) == (5, [held])


def test_an_entry_that_is_gone_is_not_counted() -> None:
    loaded, held, other = Loaded(), Held("a", None), Held("b", None)
    loaded[held] = 3
    loaded[held] = 4
    loaded[other] = 1
    del held
    gc.collect()
    assert (loaded.nbytes, len(loaded), list(loaded)) == (1, 1, [other])
