"""Numbers as people read them; the end of a metric's name is its unit."""

from __future__ import annotations

import re

# What rounds to a full unit is said in that unit.
_ALMOST = 0.9995
_STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def say(metric: str, value: float) -> str:
    """Write a number with its unit."""
    if not value:
        return "0"
    if metric.endswith("bytes_per_second"):
        return f"{_scaled(value)}B/s"
    if metric.endswith("bytes"):
        return f"{_scaled(value)}B"
    if metric.endswith("seconds"):
        return _say_seconds(value)
    if metric.endswith(("count", "files")):
        return f"{value:,.0f}"
    if metric == "x":
        return f"{_short(value)}x"
    return _short(value)


def mark(metric: str, value: float) -> str:
    """Write a number for an axis: as short as it may be."""
    return re.sub(r"\.0+(?!\d)", "", say(metric, value))


def _say_seconds(seconds: float) -> str:
    for size, name in ((60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= (2 * size if name == "min" else _ALMOST * size):
            return f"{_short(seconds / size)} {name}"
    return f"{_short(seconds * 1e9)} ns"


def _scaled(value: float) -> str:
    for size, name in _STEPS:
        if abs(value) >= _ALMOST * size:
            return f"{_short(value / size)} {name}"
    return f"{_short(value)} "


def _short(value: float) -> str:
    """Three digits that count."""
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    for least, digits in ((100, 0), (10, 1), (0, 2)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value}"
