"""Passes over a model that does not fit the memory there is: how long, and how much is read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import caches, gauges, raw_device, ways
from .arms import Arm, run_arm
from .checkpoints import Checkpoint, Spec, made, there
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .results import Key, Results, Sample, Series, UnmeasuredError
from .targets import TARGETS

_SPECS = {"tiny": Spec(4, 64), "short": Spec(96, 2048), "full": Spec(64, 4096)}
_ROUNDS = {"tiny": 1, "short": 2, "full": 5}
_PASSES = {"tiny": 3, "short": 4, "full": 6}
# The model is so many times the limit.
_FACTORS = (1.2, 2.0, 4.0)
_PEER_FACTOR = 2.0
_TINY_LIMIT_BYTES = 800_000_000
# What is left of the limit beside the budget: for inputs, outputs, and the kernel's own.
_SPARED_BYTES = 96 << 20
_LEAST_BUDGET_BYTES = 32 << 20
_SEED = 7


# ---------------------------------------------------------------------- in the child


def measure(
    label: str, folder: str, passes: int, reference: str, limit_bytes: int, scratch: str
) -> list[Sample]:
    """Run an opened model several times. (An arm's work.)

    The first pass is told apart: there a library learns, and the others start from what it
    left in memory.
    """
    ways.warm_up(label, scratch)
    checkpoint = there(folder)
    inputs = _inputs(checkpoint)
    side = checkpoint.spec.side
    torch.nn.functional.linear(inputs, torch.randn(side, side))  # torch starts its threads
    before_bytes = gauges.anonymous_bytes()
    budget_bytes = max(_LEAST_BUDGET_BYTES, limit_bytes - before_bytes - _SPARED_BYTES)
    model = ways.open_as(label, checkpoint, Path(scratch), budget_bytes)
    seconds, read_bytes, kept_bytes, equal = [], [], [], []
    used_seconds = 0.0
    for _ in range(passes):
        used_seconds, before_read = gauges.cpu_seconds(), gauges.device_read_bytes()
        started = time.perf_counter()
        with torch.no_grad():
            outputs = model(inputs)
        seconds.append(time.perf_counter() - started)
        used_seconds = gauges.cpu_seconds() - used_seconds
        read_bytes.append(gauges.device_read_bytes() - before_read)
        in_files = sum(map(caches.resident_bytes, checkpoint.files))
        kept_bytes.append(in_files + max(0, gauges.anonymous_bytes() - before_bytes))
        equal.append(_digest(outputs) == reference)
    return [
        Sample("pass_seconds", Series(tuple(seconds[1:])).median),
        Sample("first_seconds", seconds[0]),
        Sample("read_bytes", Series(tuple(read_bytes[1:])).median),
        Sample("kept_bytes", Series(tuple(kept_bytes[1:])).median),
        Sample("cpu_seconds", used_seconds),
        Sample("start_bytes", before_bytes),
        Sample("equal_share", sum(equal) / len(equal)),
    ]


def remember(folder: str, path: str, scratch: str) -> list[Sample]:
    """Run the model in memory, and write down what it gives. (An arm's work.)"""
    checkpoint = there(folder)
    model = ways.open_as(ways.PLAIN, checkpoint, Path(scratch))
    with torch.no_grad():
        Path(path).write_text(_digest(model(_inputs(checkpoint))))
    return []


def _inputs(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.randn(1, checkpoint.spec.side, generator=torch.Generator().manual_seed(_SEED))


def _digest(outputs: torch.Tensor) -> str:
    if not bool(outputs.isfinite().all()):
        raise ValueError("the model's outputs are not finite, so that they cannot be compared")
    return hashlib.sha256(outputs.contiguous().numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    checkpoint = made(place.work_dir, _SPECS[place.scale])
    size_bytes = checkpoint.spec.size_bytes
    passes = _PASSES[place.scale]
    notes = [
        f"A chain of {checkpoint.spec.layers} Linear({checkpoint.spec.side}, "
        f"{checkpoint.spec.side}) in float32, {size_bytes / 1e6:.0f} MB, one row of input, "
        f"{passes} passes; times are those after the first.",
        "The limit is a memory control group for the whole process, python, torch and the "
        "peer's imports included: see the column of what they take before opening.",
        f"{ways.PLAIN.capitalize()}: all of it in memory, without a limit. No pass is shorter than "
        "that, nor than the raw device takes for what is read in it.",
        f"With max_memory: the limit less what python takes and {_SPARED_BYTES >> 20} MiB.",
        "Kept: what of the model's files is in the page cache at the end of a pass, and the "
        "anonymous memory gained since before opening.",
    ]
    if place.no_limits is not None:
        notes.append(f"Nothing was measured: no memory limit can be set, {place.no_limits}")
        return Plan([], 0, notes)
    reference = _reference(checkpoint, place.work_dir)
    arms = [
        Arm(
            raw_device.READ_LABEL,
            "raw_device:read",
            {"paths": [str(path) for path in checkpoint.files]},
            cold=[] if place.scale == "tiny" else checkpoint.files,
        ),
        Arm(
            ways.PLAIN,
            "larger_than_memory:measure",
            {
                "label": ways.PLAIN,
                "folder": str(checkpoint.folder),
                "passes": passes,
                "reference": reference,
                "limit_bytes": 2 * size_bytes,
            },
        ),
    ]
    for factor in _FACTORS:
        labels = [ways.OURS, ways.OURS_BUDGET, ways.CT_DISK]
        if factor == _PEER_FACTOR or place.scale == "full":
            labels.append(ways.ACCELERATE)
        limit_bytes = round(size_bytes / factor)
        if place.scale == "tiny":
            limit_bytes = _TINY_LIMIT_BYTES
        arms += [
            Arm(
                label,
                "larger_than_memory:measure",
                {
                    "label": label,
                    "folder": str(checkpoint.folder),
                    "passes": passes,
                    "reference": reference,
                    "limit_bytes": limit_bytes,
                },
                at=factor,
                needs=ways.NEEDS.get(label, ()),
                limit_bytes=limit_bytes,
                cold=[] if place.scale == "tiny" else checkpoint.files,
            )
            for label in labels
        ]
    return Plan(arms, _ROUNDS[place.scale], notes)


def _reference(checkpoint: Checkpoint, work_dir: Path) -> str:
    """Give the digest of what the model gives when all of it is in memory."""
    path = work_dir / f"{checkpoint.folder.name}.sha256"
    told = {"folder": str(checkpoint.folder), "path": str(path)}
    run_arm(Arm(ways.PLAIN, "larger_than_memory:remember", told), work_dir)
    return path.read_text()


def _judge(results: Results) -> list[Outcome]:
    found = []
    raw = [Key(raw_device.READ_LABEL, "bytes_per_second")]
    size = Key(raw_device.READ_LABEL, "moved_bytes")
    for at in filter(None, sizes(results, "pass_seconds")):
        for label in (ways.OURS, ways.OURS_BUDGET):
            found += _judge_one(results, label, at, raw, size)
    return found


def _judge_one(
    results: Results, label: str, at: float, raw: Sequence[Key], size: Key
) -> list[Outcome]:
    detail = f"{_at_words(at)}, {ways.variant(label)}"
    ours, peer, other = (
        Key(one, "pass_seconds", at) for one in (label, ways.CT_DISK, ways.ACCELERATE)
    )
    read, kept = Key(label, "read_bytes", at), Key(label, "kept_bytes", at)
    found = []
    target = f"pass-{at:g}"
    if target in TARGETS:
        found.append(outcome(target, detail, results.ratio, peer, ours, raw=raw))
    if at == _PEER_FACTOR:
        found.append(outcome("pass-accelerate", detail, results.ratio, other, ours, raw=raw))
    return [
        *found,
        outcome("pass-bytes", detail, results.combine, _of_what_was_not_kept, read, kept, size),
        outcome("pass-equal", detail, results.series, Key(label, "equal_share", at)),
    ]


def _of_what_was_not_kept(read_bytes: float, kept_bytes: float, size_bytes: float) -> float:
    if kept_bytes >= size_bytes:
        raise UnmeasuredError("all of the model was kept, so nothing had to be read")
    return read_bytes / (size_bytes - kept_bytes)


def _panels(results: Results) -> list[Panel]:
    found = []
    for at in filter(None, sizes(results, "pass_seconds")):
        for metric, title in (("pass_seconds", "A pass"), ("read_bytes", "Read in a pass")):
            found.append(Panel(f"{title}, {_at_words(at)}", metric, bars(results, metric, at)))
    return found


def _at_words(at: float) -> str:
    return f"model {at:g}x the memory"


FIGURE = Figure(
    "larger_than_memory",
    "Passes over a model larger than memory",
    {
        "pass_seconds": "a pass",
        "first_seconds": "first pass",
        "read_bytes": "read a pass",
        "kept_bytes": "kept",
        "cpu_seconds": "processor time",
        "start_bytes": "taken before opening",
        "equal_share": "equal outputs",
        "bytes_per_second": "speed",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
)
