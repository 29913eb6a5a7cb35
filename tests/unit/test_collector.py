"""The collector pauses, goes on as it was, and does not look at first through what was made."""

from __future__ import annotations

import gc

from diskoffload.system.collector import collector_paused


def test_what_was_made_to_stay_is_not_young() -> None:
    gc.unfreeze()  # what the fixture for quick collections froze
    gc.collect()
    with collector_paused(all_stays=True):
        assert not gc.isenabled()
        made = [[number] for number in range(5000)]
    assert gc.isenabled()
    assert gc.get_count()[0] < 2000
    assert any(one is made for one in gc.get_objects(generation=2))
    assert not gc.get_freeze_count()


def test_garbage_that_is_young_stays_so() -> None:
    gc.unfreeze()
    gc.collect()
    young: list[object] = []
    with collector_paused():
        young.append(young)
    assert not any(one is young for one in gc.get_objects(generation=2))


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()  # as servers do before they fork
    try:
        frozen = gc.get_freeze_count()
        with collector_paused(all_stays=True):
            assert len([[number] for number in range(5000)]) == 5000
        assert gc.get_freeze_count() == frozen > 0
    finally:
        gc.unfreeze()
