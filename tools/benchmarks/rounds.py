"""Runs the arms of a figure in turns: A B C, A B C, ..."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .arms import Arm, ArmError, run_arm
from .figure import Figure, Plan
from .results import Key, Results


def run_rounds(figure: Figure, plan: Plan, work_dir: Path) -> Results:
    """Run all rounds, so that a drift of the machine falls on every arm alike.

    An arm that failed once is left out of the rounds that follow; its reason is kept.
    """
    results = Results()
    for number in range(plan.rounds):
        for arm in plan.arms:
            place = (arm.label, arm.at)
            if place in results.faults:
                continue
            started_seconds = time.monotonic()
            try:
                samples = run_arm(arm, work_dir)
            except ArmError as error:
                results.faults[place] = str(error)
                said = str(error)
            else:
                for sample in samples:
                    at = arm.at if sample.at is None else sample.at
                    results.add(Key(arm.label, sample.metric, at), number, sample.value)
                said = f"{time.monotonic() - started_seconds:.1f} s"
            print(
                f"{figure.name} {number + 1}/{plan.rounds}  {_title(figure, arm)}: {said}",
                file=sys.stderr,
                flush=True,
            )
    return results


def _title(figure: Figure, arm: Arm) -> str:
    return arm.label if arm.at is None else f"{arm.label}, {figure.at_words(arm.at)}"
