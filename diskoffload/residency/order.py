"""The order in which entries are read: learned, and told ahead.

What was read is kept as one long sequence. Whenever a read is not the expected one, the latest
place in the sequence is looked for that was reached by the same last reads, and what followed
there is expected to follow again (prediction by the longest matching context, as in Cleary and
Witten, "Data Compression Using Adaptive Coding and Partial String Matching", 1984). So a
repeated order is known after one pass, a changed one after its first pass, and of an order that
changes always what repeats of it. Where that was wrong of a key time and again (an expert that a
router picks now and then), how often the key was read tells more. Nothing that is decided by it
can be wrong, only slow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# How many reads tell one place from another: a layer of a sequential pipeline is visited twice,
# and only what came before it tells which time this is.
_CONTEXT = 4
# Of a key that was read so often, its own reads tell more than those of others.
_YOUNG = 3
# How much each read of a key changes the trust in what the sequence says of it, how far that may
# be off, and the trust below which the key's own habit counts as well: of values between 0.5 and
# 0.85, and 0.1 and 0.35, the ones that served routers best and cost a pipeline nothing.
_LEARNING = 0.2
_NEAR_SHARE = 0.2
_LEAST_TRUST = 0.7
# What is older than so many passes is forgotten.
_PASSES = 4
_LEAST_LENGTH = 1024

Key = int


@dataclass(slots=True)
class _Habit:
    """How one key was read so far.

    Attributes:
        first: in which read of all it was read first.
        last: in which it was read last.
        count: how often it was read.
        said: in how many reads after the last one the sequence expected the next.
        trust: how often, of late, that was right; 1 is always.
        least: the least distance of two reads, of late: a pass.
    """

    first: int
    last: int
    count: int
    said: int
    trust: float = 1.0
    least: float = float("inf")

    def learn(self, gap: int) -> None:
        was_right = abs(gap - self.said) <= max(2, _NEAR_SHARE * gap)
        self.trust += _LEARNING * (was_right - self.trust)
        self.least = min(self.least * 1.05, gap)

    def forget(self, now: int) -> None:
        """Have the older half of the reads count no more; routing follows the prompt."""
        if self.count >= 2 * _YOUNG:
            self.count //= 2
            self.first = (self.first + now) // 2

    def next_use(self, now: int) -> float:
        """Tell in how many reads it is due, if each pass picks it or not by chance."""
        mean = max((now - self.first) / self.count, 1.0)
        turn = max(1.0, min(self.least, mean))
        return turn - (now - self.last) % turn + mean - turn


class Order:
    """Reads in their order. Not thread-safe.

    Attributes:
        now: how many reads there were.
    """

    def __init__(self, expected: Iterable[Key] = ()) -> None:
        """Begin.

        Args:
            expected: in which order the first pass will most likely read.
        """
        self.now = 0
        self._sequence: list[Key] = []
        self._places: dict[Key, list[int]] = {}
        self._last_by_context: dict[tuple[Key, ...], int] = {}
        self._at = -1
        self._begins = True
        self._habits: dict[Key, _Habit] = {}
        self._gaps: dict[int, int] = {}
        for key in expected:
            self._append(key)

    def read(self, key: Key) -> bool:
        """Note that a key was read just now; tell whether it was the expected one."""
        following = self._at + 1
        was_expected = (
            not self._begins
            and following < len(self._sequence)
            and self._sequence[following] == key
        )
        if not was_expected:
            following = self._find(key)
        self._begins = False
        habit = self._learn(key)
        self._append(key)
        self._at = following
        self.now += 1
        if len(self._sequence) >= max(_LEAST_LENGTH, 2 * _PASSES * len(self._places)):
            self._forget()
        habit.said = self._replayed(key)
        return was_expected

    def expected(self) -> Iterator[Key]:
        """Tell what will be read next, in order, as far as that is known."""
        if not self._begins:
            yield from self._sequence[self._at + 1 :]

    def next_use(self, key: Key) -> int:
        """Tell in how many reads a key is expected; a whole pass where nothing is known."""
        expected = self._replayed(key)
        far = len(self._places) + 1
        habit = self._habits.get(key)
        if habit is None:
            return expected
        if habit.count < _YOUNG and habit.count not in self._gaps:
            # Nobody came back after so many reads yet: who was read last is then needed last,
            # and who is due again before.
            return 2 * far - (self.now - habit.last)
        left = habit.last + self._gaps.get(habit.count, far) - self.now
        expected = min(expected, left) if left > 0 else expected
        if habit.count < _YOUNG or habit.trust >= _LEAST_TRUST:
            return expected
        due = habit.next_use(self.now)
        return round(due + habit.trust * (min(expected, due) - due))

    def _replayed(self, key: Key) -> int:
        """Tell in how many reads the sequence has a key next; a whole pass if it has it not."""
        places = self._places.get(key, ())
        number = bisect_right(places, self._at)
        return places[number] - self._at if number < len(places) else len(self._places) + 1

    def _learn(self, key: Key) -> _Habit:
        """Take note how soon a key is read again, and others that were read as often so far."""
        habit = self._habits.get(key)
        if habit is None:
            habit = self._habits[key] = _Habit(self.now, self.now, 1, 0)
            return habit
        gap = self.now - habit.last
        if habit.count < _YOUNG:
            self._gaps[habit.count] = gap
        habit.learn(gap)
        habit.last = self.now
        habit.count += 1
        return habit

    def _append(self, key: Key) -> None:
        place = len(self._sequence)
        self._sequence.append(key)
        self._places.setdefault(key, []).append(place)
        for length in range(1, min(_CONTEXT, place + 1) + 1):
            self._last_by_context[tuple(self._sequence[place + 1 - length :])] = place

    def _find(self, key: Key) -> int:
        """Find the latest place that the last reads and this one led to."""
        for length in range(min(_CONTEXT, len(self._sequence) + 1), 0, -1):
            before = self._sequence[len(self._sequence) + 1 - length :] if length > 1 else []
            place = self._last_by_context.get((*before, key))
            if place is not None:
                return place
        return len(self._sequence)  # never seen: nothing is known to follow

    def _forget(self) -> None:
        gone = len(self._sequence) // 2
        kept, at = self._sequence[gone:], self._at - gone
        self._sequence, self._places, self._last_by_context = [], {}, {}
        for key in kept:
            self._append(key)
        self._habits = {key: one for key, one in self._habits.items() if key in self._places}
        for habit in self._habits.values():
            habit.forget(self.now)
        self._at = at if at >= 0 else len(kept) - 1
