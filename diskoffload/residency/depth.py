"""How far ahead to read: as far as it is mostly for something."""

from __future__ import annotations

from math import log

# How much each entry that was read ahead changes what is thought of the next ones.
_LEARNING = 1 / 8
# What is taken as often as this is read ahead without bound: an order that is known.
_SURE = 0.999
_NO_BOUND = 1 << 60


class Depth:
    """Learns from what became of the entries that were read ahead. Not thread-safe."""

    def __init__(self) -> None:
        """Begin with trust, as most models have one order."""
        self._taken_share = 1.0

    def note_taken(self) -> None:
        """Note that one was used."""
        self._taken_share += _LEARNING * (1 - self._taken_share)

    def note_given_up(self) -> None:
        """Note that one was not, as others were used in its place."""
        self._taken_share -= _LEARNING * self._taken_share

    def entries(self, *, was_expected: bool) -> int:
        """Tell how many entries should be on their way.

        As many as make the last of them likelier than not to be used, where each is as likely and
        none is after one that is not. Where that is none, one after a read that was expected.
        """
        if self._taken_share > _SURE:
            return _NO_BOUND
        if self._taken_share < 0.5:
            return int(was_expected)
        return int(log(0.5) / log(self._taken_share))
