"""Work that a few threads share: every number once, errors raised here, nothing left running."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from shard_files import in_child
from thread_limit import threads_left

from diskoffload.store import parallel
from diskoffload.store.parallel import share, threads_for

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "threads_for", lambda count: min(3, count))


def done_by(count: int) -> list[list[int]]:
    """Share work, and give what each thread did."""
    done: list[list[int]] = []

    def work(numbers: Iterator[int]) -> None:
        mine: list[int] = []
        done.append(mine)
        mine.extend(numbers)

    share(count, work)
    return done


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_every_number_is_given_once_and_in_order(count: int) -> None:
    done = done_by(count)
    assert len(done) == max(1, min(3, count))
    assert sorted(number for mine in done for number in mine) == list(range(count))
    assert all(mine == sorted(mine) for mine in done)


def test_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)
    seen: list[int] = []

    def work(numbers: Iterator[int]) -> None:
        for _ in numbers:
            together.wait()
            seen.append(threading.get_ident())

    share(3, work)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("failing", ["here", "elsewhere"])
def test_an_error_of_any_thread_is_raised_here_and_stops_the_others(failing: str) -> None:
    here = threading.current_thread()
    done: list[int] = []
    both_began = threading.Barrier(3, timeout=20)

    def work(numbers: Iterator[int]) -> None:
        both_began.wait()
        for number in numbers:
            if (threading.current_thread() is here) == (failing == "here"):
                raise KeyError(number)
            done.append(number)

    with pytest.raises(KeyError):
        share(10_000_000, work)
    assert len(done) < 9_000_000


def test_where_no_thread_can_be_had_one_does_it_all() -> None:
    with threads_left(0):
        assert done_by(50) == [list(range(50))]


def test_a_forked_child_shares_work_too() -> None:
    done_by(100)
    assert in_child(lambda: sum(map(len, done_by(100)))) == 100


def test_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert threads_for(1) == threads_for(0) == 1
    if hasattr(os, "sched_getaffinity"):
        for processors, wanted in ((1, 1), (2, 2), (64, 4)):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=processors: set(range(n)))
            assert threads_for(1000) == wanted
            assert threads_for(2) == min(2, wanted)
