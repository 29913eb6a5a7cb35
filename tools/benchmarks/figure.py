"""What a figure is: arms to run, sentences to judge, panels to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arms import Arm
from .results import Key, Results, Series, UnmeasuredError

SCALES = ("tiny", "short", "full")
"""``tiny`` tries the machinery; its numbers mean nothing."""


@dataclass(frozen=True)
class Place:
    """Where and how large.

    Attributes:
        work_dir: a folder on the disk to measure.
        scale: one of :data:`SCALES`.
        no_limits: why no memory limit can be set here; ``None`` if one can.
    """

    work_dir: Path
    scale: str
    no_limits: str | None


@dataclass
class Plan:
    """What will be run.

    Attributes:
        arms: in the order of each round.
        rounds: how many.
        notes: what a reader of the numbers should know.
    """

    arms: list[Arm]
    rounds: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What a target was held against.

    Attributes:
        target: its key in ``targets.TARGETS``.
        detail: which case of it, in plain words; may be empty.
        found: the number, in every round; ``None`` if there is none.
        reason: why there is none.
    """

    target: str
    detail: str
    found: Series | None
    reason: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: the median, with a whisker from the least to the greatest."""

    label: str
    series: Series


@dataclass(frozen=True)
class Panel:
    """One chart: bars, or lines over a size.

    Attributes:
        title: what is shown, in plain words.
        metric: names the unit by its end.
        bars: from top to bottom.
        lines: by label, points of size and number.
        size_title: of the axis of sizes.
        size_metric: unit of the sizes, as for ``metric``.
        log: whether the axis is logarithmic.
    """

    title: str
    metric: str
    bars: Sequence[Bar] = ()
    lines: Mapping[str, Sequence[tuple[float, Series]]] = field(default_factory=dict)
    size_title: str = ""
    size_metric: str = ""
    log: bool = False


@dataclass(frozen=True)
class Figure:
    """One of the things that are measured.

    Attributes:
        name: for ``--only``.
        title: a headline.
        columns: by metric, the head of its column in plain words.
        at_words: says a size.
        plan: prepares files and lists the arms.
        judge: holds results against the targets.
        panels: chooses what is drawn.
        on_disk: whether the work folder must lie on a disk.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    at_words: Callable[[float], str]
    plan: Callable[[Place], Plan]
    judge: Callable[[Results], list[Outcome]]
    panels: Callable[[Results], list[Panel]]
    on_disk: bool = True


def outcome(
    target: str, detail: str, measure: Callable[..., Series], *keys: Any, **options: Any
) -> Outcome:
    """Judge one case: what ``measure`` gives of its arguments, or why it cannot."""
    try:
        return Outcome(target, detail, measure(*keys, **options))
    except UnmeasuredError as error:
        return Outcome(target, detail, None, str(error))


def bars(results: Results, metric: str, at: float | None) -> list[Bar]:
    """Give a bar for each arm that has the number."""
    return [
        Bar(key.label, results.series(key))
        for key in results.measured()
        if (key.metric, key.at) == (metric, at)
    ]


def lines(results: Results, metric: str) -> dict[str, list[tuple[float, Series]]]:
    """Give a line for each arm that has the number at some sizes."""
    found: dict[str, list[tuple[float, Series]]] = {}
    for key in results.measured():
        if key.metric == metric and key.at is not None:
            found.setdefault(key.label, []).append((key.at, results.series(key)))
    return {label: sorted(points, key=lambda point: point[0]) for label, points in found.items()}


def sizes(results: Results, metric: str) -> list[float | None]:
    """List the sizes at which a number was measured."""
    return list(dict.fromkeys(key.at for key in results.measured() if key.metric == metric))


__all__ = [
    "SCALES",
    "Bar",
    "Figure",
    "Key",
    "Outcome",
    "Panel",
    "Place",
    "Plan",
    "bars",
    "lines",
    "outcome",
    "sizes",
]
