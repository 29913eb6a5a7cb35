"""What was found, as JSON, as Markdown and as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figure import Figure, Outcome
from .results import MAX_RAW_DRIFT, Key, Results
from .targets import TARGETS, Target
from .units import say

_ABSENT = "-"


@dataclass(frozen=True)
class Measured:
    """One figure, done."""

    figure: Figure
    results: Results
    outcomes: Sequence[Outcome]
    notes: Sequence[str]
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """Rows of text below heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_markdown(self) -> str:
        """Give it as GitHub shows it."""
        lines = [list(self.heads), ["---"] * len(self.heads), *map(list, self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def as_text(self) -> str:
        """Give it for a terminal."""
        lines = [[cell.replace("`", "") for cell in line] for line in (self.heads, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def verdict(outcome: Outcome) -> str:
    """Say whether a target is met, or why that is not known."""
    if outcome.found is None:
        return "refused" if outcome.reason.startswith("refused") else "not measured"
    return "met" if TARGETS[outcome.target].is_met(outcome.found.median) else "NOT MET"


def targets_table(done: Sequence[Measured]) -> Table:
    """Hold everything against its target."""
    rows = []
    for one in done:
        for outcome in one.outcomes:
            target = TARGETS[outcome.target]
            if outcome.found is None:
                found = outcome.reason
            else:
                found = f"{say(target.unit, outcome.found.median)} {_spread(outcome.found.spread)}"
            what = (one.figure.name, target.text, outcome.detail)
            rows.append([*what, found, _wanted(target), verdict(outcome)])
    return Table(["figure", "what", "case", "measured", "target", ""], rows)


def arms_table(one: Measured) -> Table:
    """Show the medians of every arm, each with its spread."""
    keys = list(one.results.measured())
    columns = {
        metric: head
        for metric, head in one.figure.columns.items()
        if any(key.metric == metric for key in keys)
    }
    places = dict.fromkeys((key.at, key.label) for key in keys)
    for label, at in one.results.faults:
        places.setdefault((at, label))
    rows = []
    for at, label in sorted(places, key=lambda place: place[0] or 0.0):
        where = "" if at is None else one.figure.at_words(at)
        fault = one.results.faults.get((label, at))
        cells = [_cell(one.results, Key(label, metric, at)) for metric in columns]
        if fault is not None and cells:
            cells[0] = fault
        rows.append([where, label, *cells])
    heads = ["", "", *columns.values()]
    if not any(row[0] for row in rows):
        return Table(heads[1:], [row[1:] for row in rows])
    return Table(heads, rows)


def as_json(machine: Mapping[str, Any], scale: str, done: Sequence[Measured]) -> dict[str, Any]:
    """Give everything, every round's numbers included."""
    return {
        "scale": scale,
        "machine": machine,
        "max_raw_drift": MAX_RAW_DRIFT,
        "figures": {one.figure.name: _figure_json(one) for one in done},
    }


def write(folder: Path, machine: Mapping[str, Any], scale: str, done: Sequence[Measured]) -> None:
    """Write ``report.json`` and ``report.md``."""
    found = json.dumps(as_json(machine, scale, done), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(found + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(machine, scale, done), encoding="utf-8")


def as_text(machine: Mapping[str, Any], done: Sequence[Measured]) -> str:
    """Give the tables for a terminal."""
    parts = [_machine_words(machine)]
    for one in done:
        parts.append(f"{one.figure.title}\n{arms_table(one).as_text()}")
        parts += one.notes
    targets = targets_table(done)
    if targets.rows:
        parts.append(f"Against the targets\n{targets.as_text()}")
    return "\n\n".join(parts)


def _markdown(machine: Mapping[str, Any], scale: str, done: Sequence[Measured]) -> str:
    parts = [
        "# Benchmarks",
        f"Scale: {scale}. {_machine_words(machine)}",
        "Medians over the rounds; after ± the distance from the least to the greatest, as a part "
        "of the median. Every arm ran in its own process, arms in turns. No ratio is given if "
        f"probes of the raw device differed by more than {MAX_RAW_DRIFT}x.",
    ]
    targets = targets_table(done)
    if targets.rows:
        parts += ["## Against the targets", targets.as_markdown()]
    for one in done:
        parts += [
            f"## {one.figure.title}",
            f"{one.rounds} rounds, {one.seconds:.0f} s.",
            arms_table(one).as_markdown(),
            "\n".join(f"- {note}" for note in one.notes),
        ]
    return "\n\n".join(parts) + "\n"


def _machine_words(machine: Mapping[str, Any]) -> str:
    disk = machine["disk"]
    packages = ", ".join(
        f"{name} {version or 'missing'}" for name, version in machine["packages"].items()
    )
    device = disk["device"] or "no block device"
    return (
        f"{machine['processor']}, {machine['processors_usable']} processors, "
        f"{say('bytes', machine['memory_bytes'])} of memory, {machine['kernel']}; "
        f"{disk['file_system']} on {device}, load {machine['load_average']:.1f} at the start. "
        f"Python {machine['python']}, {packages}; commit {machine['commit'] or 'not known'}."
    )


def _figure_json(one: Measured) -> dict[str, Any]:
    numbers = []
    for key in one.results.measured():
        series = one.results.series(key)
        numbers.append(
            {
                **key._asdict(),
                "median": series.median,
                "spread": series.spread,
                "rounds": list(series.values),
            }
        )
    faults = [
        {"label": label, "at": at, "reason": reason}
        for (label, at), reason in one.results.faults.items()
    ]
    return {
        "title": one.figure.title,
        "rounds": one.rounds,
        "seconds": one.seconds,
        "notes": list(one.notes),
        "numbers": numbers,
        "faults": faults,
        "targets": [_outcome_json(outcome) for outcome in one.outcomes],
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    target = TARGETS[outcome.target]
    found = outcome.found
    return {
        "key": target.key,
        "what": target.text,
        "case": outcome.detail,
        "target": _wanted(target),
        "median": None if found is None else found.median,
        "spread": None if found is None else found.spread,
        "rounds": [] if found is None else list(found.values),
        "reason": outcome.reason,
        "verdict": verdict(outcome),
    }


def _wanted(target: Target) -> str:
    sign = {"<=": "at most", "<": "below", ">=": "at least"}[target.relation]
    return f"{sign} {say(target.unit, target.limit)}"


def _cell(results: Results, key: Key) -> str:
    if key not in set(results.measured()):
        return _ABSENT
    series = results.series(key)
    return f"{say(key.metric, series.median)} {_spread(series.spread)}".strip()


def _spread(spread: float) -> str:
    return f"±{100 * spread:.0f}%" if spread else ""
