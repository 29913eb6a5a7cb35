"""Who should leave memory, one after the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held

# Who should leave is judged anew for each so many entries once a read.
_JUDGED_A_READ = 32


class Departures:
    """The order in which entries should leave. Guarded by the residency's lock.

    To sort all of them at each read would cost more than small ones take to be read, so the order
    is kept for some reads.
    """

    def __init__(self, foresight: Foresight) -> None:
        self._foresight = foresight
        self._in_order: list[weakref.ref[Held]] = []
        self._judge_again_at = 0

    def note_read(self) -> None:
        """Note that something was read, and the order is a read older."""
        self._judge_again_at -= 1

    def next_ones(
        self, present: Callable[[], Iterable[Held]], may_leave: Callable[[Held], bool]
    ) -> Iterator[Held]:
        """Give entries that may leave, those first that should; each once in an order.

        Args:
            present: lists what is in memory.
            may_leave: tells whether one is there still, and may leave.
        """
        if self._judge_again_at <= 0 or not self._in_order:
            there = list(present())
            self._judge_again_at = len(there) // _JUDGED_A_READ
            latest_first = self._foresight.leaving_first(there)
            self._in_order = [weakref.ref(one) for one in reversed(latest_first)]
        while self._in_order:
            held = self._in_order.pop()()
            if held is not None and may_leave(held):
                yield held
