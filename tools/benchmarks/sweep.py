"""How fast a model is run through once from a cold disk, and what that costs the processor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import caches, gauges, host_memory, raw_device, read_ahead, ways
from .arms import Arm
from .checkpoints import Checkpoint, Spec, made, there
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .results import Key, Results, Sample

_SPECS = {"tiny": Spec(4, 64), "short": Spec(64, 2048), "full": Spec(64, 4096)}
_ROUNDS = {"tiny": 1, "short": 3, "full": 5}
_READ_AHEAD_KIB = (128, 8192)
_OURS = [ways.OURS, ways.OURS_STREAMED, ways.OURS_REUSING]
# What is given as max_memory, of the model: its buffers are used again and again.
_BUDGET_SHARE = 0.2
# Beside the headers, which are read at opening.
_MAX_WARM_SHARE = 0.05


class WarmError(RuntimeError):
    """What should be cold is in the page cache."""


# ---------------------------------------------------------------------- in the child


def measure(label: str, folder: str, scratch: str) -> list[Sample]:
    """Open a model and run it once. (An arm's work.)"""
    return _opened_and_swept(label, folder, scratch, may_be_warm=False)


def measure_warm(label: str, folder: str, scratch: str) -> list[Sample]:
    """Do as :func:`measure`, whatever is in memory. (An arm's work.)"""
    return _opened_and_swept(label, folder, scratch, may_be_warm=True)


def arithmetic(folder: str, scratch: str) -> list[Sample]:
    """Run a model that is in memory, for the processor time alone. (An arm's work.)"""
    ran = measure_warm(ways.PLAIN, folder, scratch)
    return [sample for sample in ran if sample.metric == "cpu_seconds"]


def _opened_and_swept(label: str, folder: str, scratch: str, *, may_be_warm: bool) -> list[Sample]:
    ways.warm_up(label, scratch)
    checkpoint = there(folder)
    budget_bytes = int(_BUDGET_SHARE * checkpoint.spec.size_bytes)
    model = ways.open_as(label, checkpoint, Path(scratch), budget_bytes)
    return swept(model, checkpoint, may_be_warm=may_be_warm)


def swept(model: torch.nn.Module, checkpoint: Checkpoint, *, may_be_warm: bool) -> list[Sample]:
    """Run an opened model once, with a single row.

    Raises:
        WarmError: more of the files is in memory than opening explains.
    """
    side = checkpoint.spec.side
    inputs = torch.randn(1, side)
    torch.nn.functional.linear(inputs, torch.randn(side, side))  # torch starts its threads
    host_memory.settle(checkpoint.spec.size_bytes)
    for path in checkpoint.files:
        caches.let_go(path)  # what the kernel read ahead of the header
    warm_bytes = sum(map(caches.resident_bytes, checkpoint.files))
    size_bytes = checkpoint.spec.size_bytes
    header_bytes = sum(path.stat().st_size for path in checkpoint.files) - size_bytes
    if warm_bytes > header_bytes + _MAX_WARM_SHARE * size_bytes and not may_be_warm:
        raise WarmError(
            f"{warm_bytes} of {size_bytes} bytes were in the page cache before the sweep; "
            "something else reads these files, or the work folder is not on a disk"
        )
    used_seconds, read_bytes = gauges.cpu_seconds(), gauges.device_read_bytes()
    started = time.perf_counter()
    with torch.no_grad():
        model(inputs)
    seconds = time.perf_counter() - started
    return [
        Sample("bytes_per_second", size_bytes / seconds),
        Sample("seconds", seconds),
        Sample("cpu_seconds", gauges.cpu_seconds() - used_seconds),
        Sample("read_bytes", gauges.device_read_bytes() - read_bytes),
        Sample("warm_bytes", warm_bytes),
    ]


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    checkpoint = made(place.work_dir, _SPECS[place.scale])
    queue = read_ahead.queue_of(place.work_dir)
    reason = read_ahead.why_not(place.work_dir)
    settings: Sequence[int | None] = _READ_AHEAD_KIB
    notes = [
        f"A chain of {checkpoint.spec.layers} Linear({checkpoint.spec.side}, "
        f"{checkpoint.spec.side}) in float32, one row of input. Opening is not counted. mincore "
        "is asked before the sweep that the files are not in memory.",
        f"With max_memory: {_BUDGET_SHARE:.0%} of the model, so that buffers are used again and "
        "fresh memory need not be cleared, as it is in a pass over a model larger than memory.",
        f"{ways.PLAIN.capitalize()}: all of it in memory; its processor time is that of the "
        "arithmetic alone, which is a part of everybody's.",
        "Read-ahead is /sys/block/DEVICE/queue/read_ahead_kb, set for each process and put back.",
    ]
    if reason is not None or queue is None or place.scale == "tiny":
        settings = [None]
        notes[-1] = (
            f"Read-ahead was left as it is, {read_ahead.read_kib(place.work_dir)} KiB: "
            f"{reason or 'the tiny scale changes nothing'}."
        )
    if host_memory.is_taken_back():
        notes.append(host_memory.NOTE)
    return Plan(
        [arm for kib in settings for arm in _arms(checkpoint, queue, kib, place.scale)],
        _ROUNDS[place.scale],
        notes,
    )


def _arms(checkpoint: Checkpoint, queue: Path | None, kib: int | None, scale: str) -> list[Arm]:
    cold = [] if scale == "tiny" else checkpoint.files
    setting = None if kib is None else (str(queue), kib)
    at = None if kib is None else float(kib)
    raw = Arm(
        raw_device.READ_LABEL,
        "raw_device:read",
        {"paths": [str(path) for path in checkpoint.files]},
        at=at,
        cold=cold,
        read_ahead=setting,
    )
    plain = Arm(
        ways.PLAIN,
        "sweep:arithmetic",
        {"folder": str(checkpoint.folder)},
        at=at,
        read_ahead=setting,
    )
    return [
        raw,
        plain,
        *(
            Arm(
                label,
                "sweep:measure" if scale != "tiny" else "sweep:measure_warm",
                {"label": label, "folder": str(checkpoint.folder)},
                at=at,
                needs=ways.NEEDS.get(label, ()),
                cold=cold,
                read_ahead=setting,
            )
            for label in _labels()
        ),
    ]


def _labels() -> list[str]:
    return [*(_OURS if ways.can_stream() else [ways.OURS]), ways.CT_DISK, ways.ACCELERATE]


def _judge(results: Results) -> list[Outcome]:
    found = []
    for at in sizes(results, "cpu_seconds"):
        raw = Key(raw_device.READ_LABEL, "bytes_per_second", at)
        peer = Key(ways.CT_DISK, "cpu_seconds", at)
        for label in _OURS:
            speed, used = Key(label, "bytes_per_second", at), Key(label, "cpu_seconds", at)
            words = ways.variant(label)
            detail = words if at is None else f"{_at_words(at)}, {words}"
            found += [
                outcome("sweep", detail, results.ratio, speed, raw, raw=[raw]),
                outcome("sweep-cpu", detail, results.ratio, used, peer),
            ]
    return found


def _panels(results: Results) -> list[Panel]:
    return [
        Panel(title if at is None else f"{title}, {_at_words(at)}", metric, drawn)
        for at in sizes(results, "cpu_seconds")
        for metric, title in (
            ("bytes_per_second", "Cold sweep"),
            ("cpu_seconds", "Processor time"),
        )
        for drawn in [bars(results, metric, at)]
    ]


def _at_words(at: float) -> str:
    return f"read-ahead {at:.0f} KiB"


FIGURE = Figure(
    "sweep",
    "One pass over a cold model",
    {
        "bytes_per_second": "speed",
        "seconds": "time",
        "cpu_seconds": "processor time",
        "read_bytes": "read from disk",
        "warm_bytes": "warm before",
    },
    _at_words,
    _plan,
    _judge,
    _panels,
)
