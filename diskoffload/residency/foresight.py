"""Which entries are read next, and which are needed last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from diskoffload.residency.held import Held
from diskoffload.residency.numbering import Numbering
from diskoffload.residency.order import Order

_NEVER = 1 << 60
_GOLDEN_SECTION = (5**0.5 - 1) / 2
# Needed late is what is needed in the later half of the time until the last is.
_LATE_SHARE = 0.5
# How far ahead of the reader is looked, however small the entries are.
_MOST_LOOKED_AT = 256


class Foresight:
    """What is expected of entries. Guarded by the residency's lock."""

    def __init__(self) -> None:
        self._numbering = Numbering()
        self._order: Order | None = None

    def show(self, held: Held) -> None:
        """Note that a module shows an entry; what is shown first is most likely read first."""
        self._numbering.show(held)

    def entries(self) -> Iterator[Held]:
        """Give every entry that is or was shown, or was read."""
        return iter(self._numbering)

    def read(self, held: Held) -> bool:
        """Note that an entry was asked for; tell whether it was the one that was expected."""
        if self._order is None:
            self._order = Order(self._numbering.numbers())
        return self._order.read(self._numbering.number(held))

    def expected(self) -> Iterator[Held]:
        """Give the entries that will be read next, in order, each once; at most some hundred."""
        seen: set[int] = set()
        order = self._order.expected() if self._order is not None else iter(())
        for _, number in zip(range(_MOST_LOOKED_AT), order, strict=False):
            held = self._numbering.entry(number)
            if held is not None and number not in seen:
                seen.add(number)
                yield held

    def latest_needed_first(self, entries: Iterable[Held]) -> list[Held]:
        """Sort entries, those first that are needed last."""
        return sorted(entries, key=self._next_use, reverse=True)

    def leaving_first(self, entries: Iterable[Held]) -> list[Held]:
        """Sort entries, those first that should leave.

        What is needed soon stays. Of the rest it is all the same in a repeated order how much
        is read who leaves, but not when: where those that stay lie among those that do not,
        evenly, the disk is never idle while these are computed with. So each has a fixed rank,
        by multiples of the golden section, which are spread evenly wherever one cuts.
        """
        uses = [(self._next_use(held), held) for held in entries]
        late = max((use for use, _ in uses), default=0) * _LATE_SHARE

        def key(one: tuple[int, Held]) -> tuple[bool, float]:
            use, held = one
            return (False, self._rank(held)) if use >= late else (True, -use)

        return [held for _, held in sorted(uses, key=key)]

    def _rank(self, held: Held) -> float:
        number = self._numbering.known_number(held)
        return 0.0 if number is None else number * _GOLDEN_SECTION % 1.0

    def is_needed_before(self, one: Held, other: Held) -> bool:
        """Whether one entry is needed before another, or as soon."""
        return self._next_use(one) <= self._next_use(other)

    def _next_use(self, held: Held) -> int:
        number = self._numbering.known_number(held)
        if self._order is None or number is None:
            return _NEVER
        return self._order.next_use(number)
