"""Entries by number, in the order in which modules show them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from diskoffload.residency.held import Held
from diskoffload.residency.weak_list import WeakList


class Numbering:
    """Numbers entries, keeping none of them alive. Guarded by the residency's lock.

    Most models never ask for a number, so an entry that is shown is only listed.
    """

    def __init__(self) -> None:
        self._shown: WeakList[Held] = WeakList()
        self._numbers: weakref.WeakKeyDictionary[Held, int] = weakref.WeakKeyDictionary()
        self._by_number: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
        self._next = 0

    def show(self, held: Held) -> None:
        """Note that a module shows an entry."""
        self._shown.add(held)

    def number(self, held: Held) -> int:
        """Give an entry's number; one that was never shown gets the next."""
        self._settle()
        return self._number(held)

    def known_number(self, held: Held) -> int | None:
        """Give an entry's number, if it has one."""
        return self._numbers.get(held)

    def entry(self, number: int) -> Held | None:
        """Give the entry of a number, unless it is gone."""
        return self._by_number.get(number)

    def __iter__(self) -> Iterator[Held]:
        self._settle()
        return iter(list(self._numbers))

    def numbers(self) -> list[int]:
        """List the numbers of all that is there, in order."""
        self._settle()
        return list(self._numbers.values())

    def _number(self, held: Held) -> int:
        found = self._numbers.get(held)
        if found is None:
            found = self._numbers[held] = self._next
            self._by_number[found] = held
            self._next += 1
        return found

    def _settle(self) -> None:
        if not self._shown:
            return
        for held in self._shown.take():
            self._number(held)
