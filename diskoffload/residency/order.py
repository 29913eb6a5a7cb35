"""The order in which entries are read: learned, and told ahead.

What was read is kept as one long sequence. Whenever a read is not the expected one, the latest
place in the sequence is looked for that was reached by the same last reads, and what followed
there is expected to follow again (prediction by the longest matching context, as in Cleary and
Witten, "Data Compression Using Adaptive Coding and Partial String Matching", 1984). So a
repeated order is known after one pass, a changed one after its first pass, and of an order that
changes always what repeats of it. Nothing that is decided by it can be wrong, only slow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

# How many reads tell one place from another: a layer of a sequential pipeline is visited twice,
# and only what came before it tells which time this is.
_CONTEXT = 4
# Of a key that was read so often, its own reads tell more than those of others.
_YOUNG = 3
# What is older than so many passes is forgotten.
_PASSES = 4
_LEAST_LENGTH = 1024

Key = int


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
        self._reads: dict[Key, tuple[int, int]] = {}
        self._gaps: dict[int, int] = {}
        for key in expected:
            self._append(key)

    def read(self, key: Key) -> None:
        """Note that a key was read just now."""
        following = self._at + 1
        if self._begins or following >= len(self._sequence) or self._sequence[following] != key:
            following = self._find(key)
        self._begins = False
        self._learn_gap(key)
        self._append(key)
        self._at = following
        self.now += 1
        self._forget()

    def expected(self) -> Iterator[Key]:
        """Tell what will be read next, in order, as far as that is known."""
        if not self._begins:
            yield from self._sequence[self._at + 1 :]

    def next_use(self, key: Key) -> int:
        """Tell in how many reads a key is expected; a whole pass where nothing is known."""
        places = self._places.get(key, ())
        number = bisect_right(places, self._at)
        far = len(self._places) + 1
        expected = places[number] - self._at if number < len(places) else far
        count, last = self._reads.get(key, (0, 0))
        if 0 < count < _YOUNG and count not in self._gaps:
            # Nobody came back after so many reads yet: who was read last is then needed last,
            # and who is due again before.
            return 2 * far - (self.now - last)
        left = last + self._gaps.get(count, far) - self.now
        return min(expected, left) if left > 0 else expected

    def _learn_gap(self, key: Key) -> None:
        """Take note how soon others may be read again that were read as often so far."""
        count, last = self._reads.get(key, (0, 0))
        if 0 < count < _YOUNG:
            self._gaps[count] = self.now - last
        self._reads[key] = count + 1, self.now

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
        most = max(_LEAST_LENGTH, 2 * _PASSES * len(self._places))
        if len(self._sequence) < most:
            return
        gone = len(self._sequence) // 2
        kept, at = self._sequence[gone:], self._at - gone
        self._sequence, self._places, self._last_by_context = [], {}, {}
        for key in kept:
            self._append(key)
        self._at = at if at >= 0 else len(kept) - 1
