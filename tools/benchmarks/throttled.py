"""Offloading to a slow disk and onloading from it, compressed and not: a real disk, slowed."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from throttle import throttled, why_not

import diskoffload
from diskoffload.residency.resident import Residency

from . import gauges, host_memory
from .arms import Arm
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .results import Key, Results, Sample

PACKED, PLAIN = "diskoffload, compressed", "diskoffload, as they are"
_COMPRESSION = {PACKED: "zstd", PLAIN: None}
_LAYERS = {"tiny": 3, "short": 48, "full": 128}
_SIDE = {"tiny": 256, "short": 2048, "full": 2048}
_ROUNDS = {"tiny": 1, "short": 2, "full": 5}
_PASSES = {"tiny": 1, "short": 2, "full": 3}
# Of disks, in MB a second: a hard disk or a network's, one on SATA or in a cloud, an NVMe drive.
_SPEEDS = {"tiny": (400,), "short": (100, 400, 1600), "full": (50, 100, 200, 400, 800, 1600)}
_ITEM_BYTES = 2
# What is kept; a pass over a larger model reads nearly all of it.
_KEPT_LAYERS = 3


# ---------------------------------------------------------------------- in the child


def measure(
    label: str, layers: int, side: int, passes: int, megabytes: float, scratch: str
) -> list[Sample]:
    """Offload a model until every byte is safe, and run it some times. (An arm's work.)"""
    torch.manual_seed(0)
    made = [torch.nn.Linear(side, side, bias=False).bfloat16() for _ in range(layers)]
    inputs = torch.randn(1, side).bfloat16()
    with torch.no_grad():
        for layer in made:
            layer.weight.normal_(std=0.02)
        expected = torch.nn.Sequential(*made)(inputs)
    size_bytes = layers * side * side * _ITEM_BYTES
    host_memory.settle(2 * size_bytes)
    residency = Residency(_KEPT_LAYERS * side * side * _ITEM_BYTES, mode="streamed")
    model = torch.nn.Sequential(*made)
    folder = Path(scratch) / "offload"
    with throttled(Path(scratch), int(megabytes * 1e6)):
        began_cpu_seconds, began = gauges.cpu_seconds(), time.perf_counter()
        for name, module in model.named_children():
            diskoffload.offload_module(
                module,
                "cpu",
                "disk",
                offload_dir=folder,
                compression=_COMPRESSION[label],
                name=name,
                residency=residency,
            )
        _make_safe(model, folder)
        offload_seconds = time.perf_counter() - began
        offload_cpu_seconds = gauges.cpu_seconds() - began_cpu_seconds
    with torch.no_grad():
        model(inputs)  # teaches the order, and finds the values in their files
    residency.make_room(0)
    taken, cpu_seconds = [], []
    with throttled(Path(scratch), int(megabytes * 1e6)):
        for _ in range(passes):
            began_cpu_seconds, began = gauges.cpu_seconds(), time.perf_counter()
            with torch.no_grad():
                found = model(inputs)
            taken.append(time.perf_counter() - began)
            cpu_seconds.append(gauges.cpu_seconds() - began_cpu_seconds)
            if not torch.equal(found, expected):
                raise RuntimeError("the output is not the plain model's")
    return [
        Sample("onload_bytes_per_second", size_bytes / statistics.median(taken)),
        Sample("offload_bytes_per_second", size_bytes / offload_seconds),
        Sample("onload_cpu_seconds", statistics.median(cpu_seconds)),
        Sample("offload_cpu_seconds", offload_cpu_seconds),
    ]


def _make_safe(model: torch.nn.Sequential, folder: Path) -> None:
    """Write all that waits, and wait until the device has it."""
    cache: Any = model[0]._parameters
    cache.sync()
    for path in [*folder.glob("*.safetensors"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    layers, side = _LAYERS[place.scale], _SIDE[place.scale]
    megabytes = layers * side * side * _ITEM_BYTES / 1e6
    notes = [
        f"A chain of {layers} Linear({side}, {side}) in bfloat16, {megabytes:.0f} MB, normally "
        "distributed weights; one row of input, "
        f"{_KEPT_LAYERS} layers may stay in memory. Offloaded from memory until fsync has "
        "returned, then run; speeds are of the model's own bytes.",
        "The disk is slowed by the kernel, reading and writing, for the process alone (block I/O "
        "controller of the first version, blkio.throttle.*_bps_device); all of it is direct I/O, "
        "which that counts.",
        *([host_memory.NOTE] if host_memory.is_taken_back() else []),
    ]
    reason = why_not(place.work_dir)
    if reason is not None:
        return Plan([], 1, [f"Not measured, because the disk cannot be slowed here: {reason}."])
    arguments = {"layers": layers, "side": side, "passes": _PASSES[place.scale]}
    arms = [
        Arm(
            label,
            "throttled:measure",
            {**arguments, "label": label, "megabytes": speed},
            at=float(speed),
        )
        for speed in _SPEEDS[place.scale]
        for label in (PLAIN, PACKED)
    ]
    return Plan(arms, _ROUNDS[place.scale], notes)


def _judge(results: Results) -> list[Outcome]:
    found = []
    for at in sizes(results, "onload_bytes_per_second"):
        for target in ("onload", "offload"):
            metric = f"{target}_bytes_per_second"
            packed, plain = Key(PACKED, metric, at), Key(PLAIN, metric, at)
            words = _at_words(at or 0)
            found.append(outcome(f"{target}-packed", words, results.ratio, packed, plain))
    return found


def _panels(results: Results) -> list[Panel]:
    return [
        Panel(f"{title}, {_at_words(at or 0)}", metric, bars(results, metric, at))
        for metric, title in (
            ("onload_bytes_per_second", "Onloading"),
            ("offload_bytes_per_second", "Offloading"),
        )
        for at in sizes(results, metric)
    ]


def _at_words(at: float) -> str:
    return f"a disk of {at:.0f} MB/s"


FIGURE = Figure(
    "throttled",
    "A slow disk, with and without compression",
    {
        "onload_bytes_per_second": "onload",
        "offload_bytes_per_second": "offload, until safe",
        "onload_cpu_seconds": "processor, a pass",
        "offload_cpu_seconds": "processor, offloading",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
)
