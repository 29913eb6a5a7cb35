"""How far ahead to read, by what became of what was read ahead."""

from __future__ import annotations

from diskoffload.residency.depth import Depth

MANY = 1 << 30


def test_a_known_order_is_read_ahead_without_bound() -> None:
    depth = Depth()
    for _ in range(100):
        depth.note_taken()
    assert depth.entries(was_expected=False) > MANY


def test_it_shrinks_step_by_step_and_grows_again() -> None:
    depth = Depth()
    found = []
    for _ in range(6):
        depth.note_given_up()
        found.append(depth.entries(was_expected=True))
    assert found == sorted(found, reverse=True)
    assert 1 < found[0] < 10
    assert found[-1] == 1
    for _ in range(50):
        depth.note_taken()
    assert depth.entries(was_expected=False) > MANY


def test_where_nothing_was_taken_it_is_tried_after_a_read_that_was_expected() -> None:
    depth = Depth()
    for _ in range(100_000):  # the share is too small for a float by then
        depth.note_given_up()
    assert depth.entries(was_expected=False) == 0
    assert depth.entries(was_expected=True) == 1
    depth.note_taken()
    assert depth.entries(was_expected=True) == 1


def test_half_of_all_taken_allow_one_after_any_read() -> None:
    depth = Depth()
    for number in range(101):
        depth.note_given_up() if number % 2 else depth.note_taken()
    assert depth.entries(was_expected=False) == 1
