"""Draws the figures as SVG, with matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figure import Panel
from .report import Measured, verdict
from .results import Series
from .targets import TARGETS
from .units import mark, say

_INK = "#24292f"
_GRID = "#d0d7de"
# One colour for each tool everywhere, told apart by colour-blind eyes as well.
_COLOURS = (
    ("diskoffload", "#0072b2"),
    ("compressed-tensors", "#e69f00"),
    ("accelerate", "#cc79a7"),
    ("raw device", "#8c959f"),
    ("plain", "#57606a"),
)
_OTHER_COLOUR = "#009e73"
_MET, _NOT_MET, _UNKNOWN = "#1a7f37", "#cf222e", "#8c959f"
_PANEL_WIDTH, _BAR_HEIGHT, _LINES_HEIGHT = 5.6, 0.42, 2.9
_TEXT_POINTS = 10
_WIDE = 10.0
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": _TEXT_POINTS,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlesize": _TEXT_POINTS + 1,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    # The same numbers give the same file.
    "svg.hashsalt": "diskoffload",
}


class NoChartError(ImportError):
    """matplotlib is missing; the message says how to get it."""


def draw(one: Measured, path: Path) -> bool:
    """Draw all panels of a figure; tell whether there was anything to draw.

    Raises:
        NoChartError: matplotlib is not installed.
    """
    panels = [panel for panel in one.figure.panels(one.results) if panel.bars or panel.lines]
    if not panels:
        return False
    pyplot = _pyplot()
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    tallest = max(max(_LINES_HEIGHT, 0.9 + _BAR_HEIGHT * len(panel.bars)) for panel in panels)
    with pyplot.rc_context(_STYLE):
        sheet, grid = pyplot.subplots(
            rows,
            columns,
            figsize=(_PANEL_WIDTH * columns, tallest * rows + 0.5),
            squeeze=False,
            layout="constrained",
        )
        sheet.suptitle(one.figure.title, fontsize=_TEXT_POINTS + 4, fontweight="bold")
        places = [axes for row in grid for axes in row]
        for axes, panel in zip(places, panels, strict=False):
            _draw_lines(axes, panel) if panel.lines else _draw_bars(axes, panel)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        _save(pyplot, sheet, path)
    return True


def draw_targets(done: Sequence[Measured], path: Path) -> bool:
    """Draw how far each target is exceeded or missed; tell whether there was any.

    Raises:
        NoChartError: matplotlib is not installed.
    """
    outcomes = [outcome for one in done for outcome in one.outcomes]
    if not outcomes:
        return False
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        sheet, axes = pyplot.subplots(
            figsize=(10.5, 1.5 + 0.3 * len(outcomes)), layout="constrained"
        )
        names = []
        for place, outcome in enumerate(outcomes):
            target = TARGETS[outcome.target]
            names.append(f"{target.text}{', ' * bool(outcome.detail)}{outcome.detail}")
            if outcome.found is None:
                axes.text(1.0, place, f"  {verdict(outcome)}", va="center", color=_UNKNOWN)
                continue
            # Right of the line is better, whichever way the target points.
            gains = [
                value / target.limit if target.relation == ">=" else target.limit / value
                for value in (outcome.found.median, *outcome.found.values)
                if value > 0
            ]
            if not gains:
                axes.text(1.0, place, f"  {verdict(outcome)}: 0", va="center", color=_MET)
                continue
            colour = _MET if verdict(outcome) == "met" else _NOT_MET
            axes.plot([min(gains), max(gains)], [place, place], color=colour, linewidth=2)
            axes.plot(gains[:1], [place], "o", color=colour, markersize=7)
            text = say(target.unit, outcome.found.median)
            axes.annotate(
                text, (max(gains), place), (6, 0), textcoords="offset points", va="center"
            )
        axes.axvline(1.0, color=_INK, linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_ylim(len(names) - 0.4, -0.6)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.3), max(high, 3.0) * 1.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("times better than the target (right of the line: met)")
        axes.set_title("What was measured, against its target")
        _save(pyplot, sheet, path)
    return True


def _draw_bars(axes: Any, panel: Panel) -> None:
    everything = [value for bar in panel.bars for value in bar.series.values]
    for place, bar in enumerate(panel.bars):
        median = bar.series.median
        below, above = _whiskers(bar.series)
        axes.barh(
            place,
            median,
            height=0.68,
            color=_colour(bar.label),
            xerr=[[below], [above]],
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 3},
        )
        axes.annotate(
            say(panel.metric, median),
            (median + above, place),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(panel.bars)), [_wrapped(bar.label) for bar in panel.bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    words = _unit_words(panel.metric)
    if panel.log and _is_wide(everything):
        axes.set_xscale("log")
        axes.set_xlim(min(everything) / 2, max(everything) * 12)
        words += ", each line ten times the one before"
        axes.minorticks_off()
    else:
        axes.set_xlim(0, (max(everything) or 1.0) * 1.3)
        axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: mark(panel.metric, value))
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(words)
    axes.set_title(panel.title)


def _draw_lines(axes: Any, panel: Panel) -> None:
    for label, points in panel.lines.items():
        whiskers = [_whiskers(series) for _, series in points]
        axes.errorbar(
            [place for place, _ in points],
            [series.median for _, series in points],
            yerr=list(zip(*whiskers, strict=True)),
            color=_colour(label),
            label=label,
            marker="o",
            markersize=5,
            linewidth=1.8,
            capsize=3,
        )
    places = sorted({place for points in panel.lines.values() for place, _ in points})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(places, [mark(panel.size_metric, place) for place in places])
    everything = [
        value for points in panel.lines.values() for _, series in points for value in series.values
    ]
    if panel.log and _is_wide(everything):
        axes.set_yscale("log")
        axes.set_ylim(min(everything) / 2, max(everything) * 30)
    else:
        axes.set_ylim(0, (max(everything) or 1.0) * 1.5)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: mark(panel.metric, value))
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.size_title)
    axes.set_title(panel.title)
    axes.legend(frameon=False, fontsize=_TEXT_POINTS - 1, loc="upper left")


def _is_wide(values: Sequence[float]) -> bool:
    """Tell whether a linear axis would hide the smaller ones."""
    return min(values) > 0 and max(values) > _WIDE * min(values)


def _unit_words(metric: str) -> str:
    if metric.endswith("bytes_per_second"):
        return "speed (longer is better)"
    return "less is better"


def _whiskers(series: Series) -> tuple[float, float]:
    return series.median - min(series.values), max(series.values) - series.median


def _colour(label: str) -> str:
    for start, colour in _COLOURS:
        if label.startswith(start):
            return colour
    return _OTHER_COLOUR


def _wrapped(label: str) -> str:
    return label.replace(", ", ",\n") if len(label) > 26 else label


def _save(pyplot: Any, sheet: Any, path: Path) -> None:
    sheet.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
    pyplot.close(sheet)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("svg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise NoChartError(
            f"no charts: {error}; pip install 'diskoffload[bench]' brings what they need"
        ) from error
