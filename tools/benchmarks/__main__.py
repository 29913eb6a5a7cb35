"""Measures the library beside its peers and beside the raw device.

Each figure runs its arms in turns, every arm in a process of its own. Writes report.json,
report.md and SVG charts to the folder given by ``--out``, and prints the tables.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cgroup import why_not

from diskoffload.system.files import memory_file_system

from . import (
    access,
    chart,
    compression,
    growth,
    larger_than_memory,
    machine,
    opening,
    quantizing,
    report,
    stages,
    sweep,
    throttled,
    writing,
)
from .figure import SCALES, Figure, Place
from .rounds import run_rounds

FIGURES: dict[str, Figure] = {
    module.FIGURE.name: module.FIGURE
    for module in (
        *(access, opening, writing, quantizing, sweep, larger_than_memory, growth),
        *(compression, throttled, stages),
    )
}
# What explains the other figures, and slow disks, take eight minutes more: in the long form, or
# when named.
_NOT_IN_SHORT = (growth.FIGURE.name, throttled.FIGURE.name, stages.FIGURE.name)
_FAILED, _WRONG, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; give the exit status.

    0: every figure was run, whatever it shows. 1: some arm failed (a missing peer is no
    failure). 2: it could not begin.
    """
    options = _parser().parse_args(arguments)
    is_short = options.scale == "short"
    asked = [name for name in FIGURES if not (is_short and name in _NOT_IN_SHORT)]
    names = options.only or asked
    base: Path = options.work_dir
    base.mkdir(parents=True, exist_ok=True)
    in_memory = memory_file_system(base)
    on_disk = [name for name in names if FIGURES[name].on_disk]
    if in_memory and on_disk and options.scale != "tiny":
        print(
            f"benchmarks: {base} lies on {in_memory}, which is memory, and {', '.join(on_disk)} "
            "measure a disk; name a folder on one with --work-dir",
            file=sys.stderr,
        )
        return _WRONG
    options.out.mkdir(parents=True, exist_ok=True)
    described = machine.describe(base)
    work_dir = Path(tempfile.mkdtemp(dir=base, prefix="diskoffload-bench-"))
    try:
        place = Place(work_dir.resolve(), options.scale, why_not())
        done = [_measure(FIGURES[name], place, options.arm) for name in names]
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    report.write(options.out, described, options.scale, done)
    print(report.as_text(described, done))
    _draw(done, options.out)
    failed = [
        reason
        for one in done
        for reason in one.results.faults.values()
        if reason.startswith("failed")
    ]
    return _FAILED if failed else 0


def _measure(figure: Figure, place: Place, wanted: Sequence[str]) -> report.Measured:
    started_seconds = time.monotonic()
    plan = figure.plan(place)
    if wanted:
        plan.arms = [arm for arm in plan.arms if any(text in arm.label for text in wanted)]
    results = run_rounds(figure, plan, place.work_dir)
    seconds = time.monotonic() - started_seconds
    return report.Measured(figure, results, figure.judge(results), plan.notes, plan.rounds, seconds)


def _draw(done: Sequence[report.Measured], out: Path) -> None:
    try:
        drawn = [out / f"{one.figure.name}.svg" for one in done]
        drawn = [path for one, path in zip(done, drawn, strict=True) if chart.draw(one, path)]
        if chart.draw_targets(done, out / "targets.svg"):
            drawn.append(out / "targets.svg")
    except chart.NoChartError as error:
        print(f"\n{error}")
        return
    print(f"\nWritten to {out}: report.json, report.md, {', '.join(one.name for one in drawn)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    scale = parser.add_mutually_exclusive_group()
    for name, words in zip(
        SCALES,
        (
            "seconds: tries the machinery, the numbers mean nothing",
            "the default: under 15 minutes",
            "an hour or more, larger models and more rounds",
        ),
        strict=True,
    ):
        scale.add_argument(f"--{name}", dest="scale", action="store_const", const=name, help=words)
    parser.set_defaults(scale="short")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(FIGURES),
        metavar="NAME",
        help=f"{', '.join(FIGURES)}; without it, the short form leaves out "
        + ", ".join(_NOT_IN_SHORT),
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="TEXT",
        help="run only arms whose label has this in it; may be given several times",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-results"), help="default: %(default)s"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("bench-data"),
        help="a folder on the disk to measure; what is made in it is removed (%(default)s)",
    )
    return parser


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that what was changed is put back
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
