"""What it costs to open a checkpoint of very many tensors."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from . import gauges, ways
from .arms import Arm
from .checkpoints import Checkpoint, Spec, build, made, there
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .results import Key, Results, Sample

_TENSORS = {"tiny": 50, "short": 50_000, "full": 50_000}
_SIDE = 8
_ROUNDS = {"tiny": 1, "short": 2, "full": 5}
_LABELS = {
    "tiny": (ways.OURS, ways.CT_DISK, ways.ACCELERATE),
    "short": (ways.OURS, ways.ACCELERATE),  # the other makes a link a tensor: a minute
    "full": (ways.OURS, ways.CT_DISK, ways.ACCELERATE),
}


# ---------------------------------------------------------------------- in the child


def measure(label: str, folder: str, scratch: str) -> list[Sample]:
    """Bind a model on the meta device to its checkpoint and dispatch it. (An arm's work.)"""
    ways.warm_up(label, scratch)
    samples, _model = opened(label, there(folder), Path(scratch))
    return samples


def opened(
    label: str, checkpoint: Checkpoint, scratch: Path
) -> tuple[list[Sample], torch.nn.Module]:
    """Measure that, and give the model."""
    model = build(checkpoint.spec)
    before_bytes, before_count = gauges.anonymous_bytes(), gauges.mapping_count()
    started = time.perf_counter()
    held = ways.bind(label, checkpoint, model, scratch)
    bound = time.perf_counter()
    ways.dispatch(label, held)
    ended = time.perf_counter()
    samples = [
        Sample("open_seconds", ended - started),
        Sample("bind_seconds", bound - started),
        Sample("dispatch_seconds", ended - bound),
        Sample("grown_bytes", max(0, gauges.anonymous_bytes() - before_bytes)),
        Sample("mapping_count", max(0, gauges.mapping_count() - before_count)),
    ]
    return samples, held


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    checkpoint = made(place.work_dir, Spec(_TENSORS[place.scale], _SIDE))
    return Plan(
        [
            Arm(
                label,
                "opening:measure",
                {"label": label, "folder": str(checkpoint.folder)},
                at=float(checkpoint.spec.tensors),
                needs=ways.NEEDS.get(label, ()),
                cold=[] if place.scale == "tiny" else checkpoint.files,
            )
            for label in _LABELS[place.scale]
        ],
        _ROUNDS[place.scale],
        [
            f"A model of Linear({_SIDE}, {_SIDE}) on the meta device is built first and is not "
            "counted, in time or memory. Then it is bound to one cold file and dispatched by a "
            "map on which every module waits on the disk.",
            "The peers bind and dispatch in one step: compressed-tensors by a symbolic link for "
            "each tensor (in the full form only, it takes a minute), accelerate by an index of "
            "the file.",
        ],
    )


def _judge(results: Results) -> list[Outcome]:
    return [
        outcome(target, _at_words(at or 0), results.series, key)
        for at in sizes(results, "open_seconds")
        for target, key in (
            ("open-time", Key(ways.OURS, "open_seconds", at)),
            ("open-memory", Key(ways.OURS, "grown_bytes", at)),
        )
    ]


def _panels(results: Results) -> list[Panel]:
    return [
        Panel(f"{title}, {_at_words(at or 0)}", metric, bars(results, metric, at))
        for at in sizes(results, "open_seconds")
        for metric, title in (
            ("open_seconds", "Binding and dispatching"),
            ("grown_bytes", "Memory it takes"),
        )
    ]


def _at_words(at: float) -> str:
    return f"{at:,.0f} tensors"


FIGURE = Figure(
    "opening",
    "Opening a checkpoint of very many tensors",
    {
        "open_seconds": "bound and dispatched",
        "bind_seconds": "bound",
        "dispatch_seconds": "dispatched",
        "grown_bytes": "memory taken",
        "mapping_count": "mappings added",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
)
