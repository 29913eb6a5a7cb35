"""What the rounds gave: medians, spreads, and ratios that are refused where they mean nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_RAW_DRIFT = 1.5
"""No ratio is given if the fastest and the slowest raw probe of a run differ by more."""


class UnmeasuredError(Exception):
    """A figure cannot be given; the message says why, as it is printed in its place."""


class Key(NamedTuple):
    """One column of one row: what was measured, of whom, and at which size."""

    label: str
    metric: str
    at: float | None = None


@dataclass(frozen=True)
class Sample:
    """One number that an arm measured in one round.

    Attributes:
        metric: what it is; ends in its unit (``_seconds``, ``_bytes``, ...).
        value: the number.
        at: the size it was measured at, where the arm measures several.
    """

    metric: str
    value: float
    at: float | None = None


@dataclass(frozen=True)
class Series:
    """The same number in every round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """From the least to the greatest, as a part of the median."""
        low, high = min(self.values), max(self.values)
        return (high - low) / abs(self.median) if low != high else 0.0

    @property
    def drift(self) -> float:
        """How many times the greatest is the least."""
        low, high = min(self.values), max(self.values)
        return high / low if low > 0 else float("inf") if high > 0 else 1.0


@dataclass
class Results:
    """All rounds of one figure.

    Attributes:
        faults: why an arm has no numbers, by its label and size.
    """

    faults: dict[tuple[str, float | None], str] = field(default_factory=dict)
    _values: dict[Key, dict[int, float]] = field(default_factory=dict)

    def add(self, key: Key, round_number: int, value: float) -> None:
        """Take in one number."""
        self._values.setdefault(key, {})[round_number] = value

    def measured(self) -> Iterator[Key]:
        """Give what was measured, in the order it was first."""
        return iter(self._values)

    def series(self, key: Key) -> Series:
        """Give a number of every round.

        Raises:
            UnmeasuredError: there is none.
        """
        return Series(tuple(self._rounds(key).values()))

    def combine(
        self, function: Callable[..., float], *keys: Key, raw: Sequence[Key] = ()
    ) -> Series:
        """Compute from several numbers of a round another one, for every round that has all.

        Args:
            function: takes the numbers in the order of ``keys``.
            keys: of what.
            raw: probes of the device that must have held still for the result to mean anything.

        Raises:
            UnmeasuredError: a number is missing, or the device did not hold still.
        """
        found = [self._rounds(key) for key in keys]
        rounds = [number for number in found[0] if all(number in one for one in found)]
        if not rounds:
            raise UnmeasuredError(f"no round has all of: {', '.join(key.label for key in keys)}")
        for key in raw:
            self._check_steady(key)
        return Series(tuple(function(*(one[number] for one in found)) for number in rounds))

    def ratio(self, top: Key, bottom: Key, *, raw: Sequence[Key] = ()) -> Series:
        """Divide two numbers of the same round, for every round; see :meth:`combine`."""
        return self.combine(lambda above, below: above / below, top, bottom, raw=raw)

    def _rounds(self, key: Key) -> dict[int, float]:
        found = self._values.get(key)
        if found:
            return found
        reason = self.faults.get((key.label, key.at)) or self.faults.get((key.label, None))
        raise UnmeasuredError(f"not measured: {key.label}: {reason or 'was not run'}")

    def _check_steady(self, key: Key) -> None:
        drift = self.series(key).drift
        if drift > MAX_RAW_DRIFT:
            raise UnmeasuredError(
                f"refused: raw device moved {drift:.1f}x ({key.label}; at most {MAX_RAW_DRIFT}x)"
            )
