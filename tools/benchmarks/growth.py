"""How cost grows with the number of tensors and with the size of the model."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch

from . import host_memory, ways
from .access import weight_seconds
from .arms import Arm
from .checkpoints import Checkpoint, Spec, made, there
from .figure import Figure, Outcome, Panel, Place, Plan, lines
from .opening import opened
from .results import Results, Sample
from .sweep import swept

_TENSORS = {
    "tiny": (10, 100),
    "short": (100, 1000, 10_000, 100_000),
    "full": (100, 1000, 10_000, 100_000),
}
_TOTAL_BYTES = {"tiny": 1 << 16, "short": 64 << 20, "full": 256 << 20}
_SIDES = {"tiny": (256, 512), "short": (512, 1024, 2048), "full": (512, 1024, 2048, 4096)}
_LAYERS = {"tiny": 4, "short": 64, "full": 64}
_ROUNDS = {"tiny": 1, "short": 2, "full": 3}
_LABELS = {
    "tiny": (ways.OURS,),
    "short": (ways.OURS, ways.CT_DISK),
    "full": (ways.OURS, ways.CT_DISK, ways.ACCELERATE),
}
# A peer that reads a file's header for every tensor takes hours beyond.
_PEERS_MOST_TENSORS = {"tiny": 100, "short": 1000, "full": 10_000}
_LEAST_SIZE_BYTES = 1 << 20


# ---------------------------------------------------------------------- in the child


def measure(label: str, folder: str, at: float, may_be_warm: bool, scratch: str) -> list[Sample]:
    """Open a model, run it once, and read a weight of it again. (An arm's work.)"""
    ways.warm_up(label, scratch)
    checkpoint = there(folder)
    samples, model = opened(label, checkpoint, Path(scratch))
    samples += swept(model, checkpoint, may_be_warm=may_be_warm)
    wanted = {"open_seconds", "grown_bytes", "bytes_per_second", "seconds"}
    found = [Sample(one.metric, one.value, at) for one in samples if one.metric in wanted]
    middle = model.get_submodule(str(checkpoint.spec.layers // 2))
    with torch.no_grad():
        if not middle.weight.is_meta:
            found.append(Sample("weight_seconds", weight_seconds(middle), at))
    return found


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    scale = place.scale
    by_tensors = [
        made(place.work_dir, Spec(count, _side_for(_TOTAL_BYTES[scale] // count)))
        for count in _TENSORS[scale]
    ]
    by_size = [made(place.work_dir, Spec(_LAYERS[scale], side)) for side in _SIDES[scale]]
    arms = []
    for checkpoint in by_tensors:
        for label in _LABELS[scale]:
            if label == ways.OURS or checkpoint.spec.tensors <= _PEERS_MOST_TENSORS[scale]:
                arms.append(_arm(label, checkpoint, float(checkpoint.spec.tensors), scale))
    for checkpoint in by_size:
        for label in _LABELS[scale]:
            arms.append(_arm(label, checkpoint, float(checkpoint.spec.size_bytes), scale))
    return Plan(
        arms,
        _ROUNDS[scale],
        [
            f"By number of tensors: {_TOTAL_BYTES[scale] >> 20} MiB in all, in one file. By size: "
            f"{_LAYERS[scale]} tensors. Opening and sweep are cold, a weight is read warm.",
            f"Peers run up to {_PEERS_MOST_TENSORS[scale]:,} tensors: beyond, one that reads the "
            "file's header for every tensor takes minutes to hours for a sweep.",
            *([host_memory.NOTE] if host_memory.is_taken_back() else []),
        ],
    )


def _side_for(nbytes: int) -> int:
    return max(4, isqrt(nbytes // 4) // 4 * 4)


def _arm(label: str, checkpoint: Checkpoint, at: float, scale: str) -> Arm:
    return Arm(
        label,
        "growth:measure",
        {
            "label": label,
            "folder": str(checkpoint.folder),
            "at": at,
            "may_be_warm": scale == "tiny",
        },
        at=at,
        needs=ways.NEEDS.get(label, ()),
        cold=[] if scale == "tiny" else checkpoint.files,
    )


def _judge(results: Results) -> list[Outcome]:
    del results
    return []


def _panels(results: Results) -> list[Panel]:
    found = []
    for metric, title in (
        ("open_seconds", "Opening"),
        ("weight_seconds", "Reading .weight, warm"),
        ("seconds", "A cold sweep"),
        ("grown_bytes", "Memory that opening takes"),
    ):
        drawn = lines(results, metric)
        for is_size, words in ((False, "number of tensors"), (True, "size of the model")):
            chosen = {
                label: [point for point in points if (point[0] >= _LEAST_SIZE_BYTES) == is_size]
                for label, points in drawn.items()
            }
            found.append(
                Panel(
                    f"{title}, by {words}",
                    metric,
                    lines={label: points for label, points in chosen.items() if points},
                    size_title=words,
                    size_metric="size_bytes" if is_size else "tensor_count",
                    log=True,
                )
            )
    return [panel for panel in found if panel.lines]


def _at_words(at: float) -> str:
    return f"{at / 1e6:,.0f} MB" if at >= _LEAST_SIZE_BYTES else f"{at:,.0f} tensors"


FIGURE = Figure(
    "growth",
    "How cost grows",
    {
        "open_seconds": "opening",
        "grown_bytes": "memory of opening",
        "weight_seconds": "reading `.weight`",
        "seconds": "a cold sweep",
        "bytes_per_second": "its speed",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
)
