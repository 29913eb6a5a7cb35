"""Entries have numbers in the order in which they were shown first; none is kept alive."""

from __future__ import annotations

import gc

from diskoffload.residency import weak_list
from diskoffload.residency.held import Held
from diskoffload.residency.numbering import Numbering


def test_numbers_follow_the_order_of_showing() -> None:
    found = Numbering()
    entries = [Held(str(n), None) for n in range(5)]
    for held in [*entries[:3], entries[1], *entries]:
        found.show(held)
    assert list(found) == entries
    assert [found.number(held) for held in entries] == [0, 1, 2, 3, 4]
    assert found.numbers() == [0, 1, 2, 3, 4]
    assert found.entry(3) is entries[3]
    late = Held("late", None)
    assert found.known_number(late) is None
    assert found.number(late) == 5


def test_what_is_shown_again_and_again_or_gone_is_not_listed_for_ever() -> None:
    found, kept = Numbering(), Held("kept", None)
    for _ in range(10 * weak_list._LEAST_LOOK):
        found.show(kept)
        found.show(Held("gone", None))
    gc.collect()
    assert len(found._shown) <= 4 * weak_list._LEAST_LOOK
    assert list(found) == [kept]
