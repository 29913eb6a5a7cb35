"""How fast a model in memory is offloaded to the disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from . import host_memory, raw_device, ways
from .arms import Arm
from .checkpoints import Spec, build, random_values
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .results import Key, Results, Sample

# Few large tensors, and many small ones of 16 KiB.
_LARGE = {"tiny": Spec(3, 32), "short": Spec(32, 2048), "full": Spec(32, 4096)}
_SMALL = {"tiny": Spec(20, 16), "short": Spec(5000, 64), "full": Spec(5000, 64)}
_ROUNDS = {"tiny": 1, "short": 2, "full": 7}


# ---------------------------------------------------------------------- in the child


def measure(label: str, layers: int, side: int, scratch: str) -> list[Sample]:
    """Offload a model, and wait until every byte of it is safe. (An arm's work.)"""
    ways.warm_up(label, scratch)
    spec = Spec(layers, side)
    model = build(spec)
    values = zip(spec.shapes(), random_values(spec), strict=True)
    model.load_state_dict(
        {name: torch.from_numpy(value) for (name, _), value in values}, assign=True
    )
    host_memory.settle(2 * spec.size_bytes)
    started = time.perf_counter()
    wait = ways.offload_from_memory(label, model, Path(scratch))
    returned = time.perf_counter()
    wait()
    written = time.perf_counter()
    files = [path for path in Path(scratch).rglob("*") if path.is_file()]
    for path in [*files, *{path.parent for path in files}]:
        _sync(path)
    durable = time.perf_counter()
    return [
        Sample("returned_seconds", returned - started),
        Sample("written_seconds", written - started),
        Sample("durable_seconds", durable - started),
        Sample("bytes_per_second", spec.size_bytes / (durable - started)),
        Sample("file_count", len(files)),
    ]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    large, small = _LARGE[place.scale], _SMALL[place.scale]
    arms = [
        Arm(
            raw_device.WRITE_LABEL,
            "raw_device:write",
            {"nbytes": large.size_bytes},
            at=float(large.tensors),
        )
    ]
    for spec in (large, small):
        labels = [ways.OURS, ways.CT_DISK]
        # It takes half a minute for the small ones.
        if spec is large or place.scale == "full":
            labels.append(ways.ACCELERATE)
        arms += [
            Arm(
                label,
                "writing:measure",
                {"label": label, "layers": spec.layers, "side": spec.side},
                at=float(spec.tensors),
                needs=ways.NEEDS.get(label, ()),
            )
            for label in labels
        ]
    mib = (large.size_bytes // large.tensors) / (1 << 20)
    kib = (small.size_bytes // small.tensors) / 1024
    return Plan(
        arms,
        _ROUNDS[place.scale],
        [
            f"{large.tensors} tensors of {mib:.3g} MiB, and {small.tensors:,} of {kib:.3g} KiB, "
            "of float32 random values.",
            "Written: all was handed to the system (the library's own sync included). Safe: "
            "after fsync of every file and folder, as the raw device's time is.",
            *([host_memory.NOTE] if host_memory.is_taken_back() else []),
        ],
    )


def _judge(results: Results) -> list[Outcome]:
    found = []
    raw_sizes = sizes(results, "moved_bytes")
    raw = [Key(raw_device.WRITE_LABEL, "bytes_per_second", at) for at in raw_sizes or [None]]
    for at in sizes(results, "written_seconds"):
        words = _at_words(at or 0)
        if at in raw_sizes:
            speed = Key(ways.OURS, "bytes_per_second", at)
            found.append(
                outcome("write", f"{words}, until safe", results.ratio, speed, raw[0], raw=raw)
            )
            continue
        files = Key(ways.OURS, "file_count", at)
        found.append(outcome("write-files", words, results.series, files))
        for metric, state in (("written_seconds", "written"), ("durable_seconds", "safe")):
            ours, peer = Key(ways.OURS, metric, at), Key(ways.CT_DISK, metric, at)
            found.append(
                outcome("write-peer", f"until {state}", results.ratio, peer, ours, raw=raw)
            )
    return found


def _panels(results: Results) -> list[Panel]:
    raw_sizes = sizes(results, "moved_bytes")
    return [
        Panel(f"Offloading speed, {_at_words(at or 0)}, until safe", metric, drawn)
        if at in raw_sizes
        else Panel(f"Seconds to offload {_at_words(at or 0)}, until written", metric, drawn)
        for at in sizes(results, "written_seconds")
        for metric in (["bytes_per_second"] if at in raw_sizes else ["written_seconds"])
        for drawn in [bars(results, metric, at)]
    ]


def _at_words(at: float) -> str:
    return f"{at:,.0f} tensors"


FIGURE = Figure(
    "writing",
    "Offloading a model from memory",
    {
        "bytes_per_second": "speed until safe",
        "returned_seconds": "call returned",
        "written_seconds": "written",
        "durable_seconds": "safe",
        "file_count": "files",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
)
