"""The budget follows what is available: down at once, up only where it is much."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from diskoffload.residency.allowance import Allowance
from diskoffload.residency.watching import Watching
from diskoffload.system.headroom import Headroom, MachineMemory

MIB = 1 << 20


class Machine:
    """A machine with so much memory available."""

    def __init__(self, available_mib: int) -> None:
        self.available_mib = available_mib

    def __call__(self) -> MachineMemory:
        return MachineMemory(10_000 * MIB, self.available_mib * MIB)


def allowance(machine: Machine, max_bytes: int | None = None) -> Allowance:
    return Allowance(max_bytes, Headroom(refresh_seconds=0, proc="/nowhere", machine=machine))


def test_what_we_have_counts_as_available_and_a_reserve_is_left() -> None:
    found = allowance(Machine(2000))
    assert found.budget_bytes(100 * MIB, asked=True) == (2000 + 100 - 512) * MIB
    assert found.budget_bytes(100 * MIB, asked=False) == 1588 * MIB // 2
    assert allowance(Machine(2000), 7 * MIB).budget_bytes(0, asked=False) == 7 * MIB
    assert allowance(Machine(100)).budget_bytes(0, asked=True) == 0


def test_less_counts_at_once_and_more_only_where_it_is_much() -> None:
    machine = Machine(1512)
    found = allowance(machine)
    assert found.budget_bytes(0, asked=True) == 1000 * MIB
    machine.available_mib = 1412
    assert found.budget_bytes(0, asked=True) == 900 * MIB
    machine.available_mib = 1412 + 89
    assert found.budget_bytes(0, asked=True) == 900 * MIB
    machine.available_mib = 1412 + 91
    assert found.budget_bytes(0, asked=True) == 991 * MIB


def test_more_that_stays_free_is_taken_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    machine = Machine(1512)
    found = allowance(machine)

    def granted_mib(available_mib: int, after_seconds: float) -> int:
        now[0] += after_seconds
        machine.available_mib = available_mib
        return found.budget_bytes(0, asked=True) // MIB

    assert granted_mib(1412, 0.1) == 900
    assert [granted_mib(1452, 0.2), granted_mib(1432, 0.2)] == [900, 900]
    assert granted_mib(1442, 0.3) == 920  # what there was all the time
    assert [granted_mib(1442, 0.2), granted_mib(1432, 0.2), granted_mib(1442, 0.4)] == [920] * 3
    assert granted_mib(1442, 0.2) == 920  # there was less meanwhile
    assert granted_mib(1442, 0.4) == 930


def test_what_we_gave_back_ourselves_is_not_missing() -> None:
    machine = Machine(1512)
    found = Allowance(None, Headroom(refresh_seconds=3600, proc="/nowhere", machine=machine))
    assert found.budget_bytes(100 * MIB, asked=True) == 1100 * MIB
    # It is not measured anew, and whatever we did since is as much in one as out of the other.
    assert found.budget_bytes(50 * MIB, asked=True) == 1100 * MIB
    assert found.budget_bytes(300 * MIB, asked=True) == 1100 * MIB
    assert found.free_bytes() == 1512 * MIB


def test_a_watch_ends_when_nothing_is_left_and_begins_again() -> None:
    left, looks = [3], threading.Semaphore(0)

    def look() -> bool:
        left[0] -= 1
        looks.release()
        return left[0] > 0

    watching = Watching(look, every_seconds=0.001)
    for _ in range(2):
        left[0] = 3
        watching.wake()
        watching.wake()
        for _ in range(3):
            assert looks.acquire(timeout=10)
        until_seconds = time.monotonic() + 10
        while any(one.name == "diskoffload-watch" for one in threading.enumerate()):
            assert time.monotonic() < until_seconds


def test_a_watch_goes_with_its_owner() -> None:
    class Owner:
        def __init__(self) -> None:
            self.watching = Watching(lambda: True, every_seconds=0.001)
            self.watching.wake()

    owner = Owner()
    gone = weakref.ref(owner)
    assert any(one.name == "diskoffload-watch" for one in threading.enumerate())
    del owner
    assert gone() is None
    assert not any(one.name == "diskoffload-watch" for one in threading.enumerate())


def test_who_comes_while_a_watch_ends_is_watched() -> None:
    answers = iter([False, True, False, False])
    looks, ended = threading.Semaphore(0), threading.Event()

    def look() -> bool:
        answer = next(answers, None)
        if answer is None:
            ended.set()
        looks.release()
        return bool(answer)

    watching = Watching(look, every_seconds=0.001)
    watching.wake()
    for _ in range(4):  # at the second one somebody had come, so it is gone on with
        assert looks.acquire(timeout=10)
    until_seconds = time.monotonic() + 10
    while any(one.name == "diskoffload-watch" for one in threading.enumerate()):
        assert time.monotonic() < until_seconds
    assert not ended.is_set()
    watching.wake()  # its thread has ended
    assert ended.wait(10)
