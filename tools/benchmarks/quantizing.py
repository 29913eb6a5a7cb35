"""How fast ``diskoffload quantize`` is beside what it cannot do without: its I/O and its sums."""

from __future__ import annotations

import contextlib
import importlib
import io
import time
from pathlib import Path

import psutil
from safetensors import safe_open
from write_checkpoint import write_checkpoint

from diskoffload.cli import main as run_command
from diskoffload.integrations.quantization import scheme_named
from diskoffload.quantize import plan_quantization

from . import host_memory, raw_device
from .arms import Arm
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome
from .results import Key, Results, Sample

_SCHEME = "W4A16"
_SIZE_BYTES = {"tiny": 4_000_000, "short": 3_000_000_000, "full": 6_000_000_000}
_ROUNDS = {"tiny": 1, "short": 2, "full": 5}
# Python, torch, transformers and compressed-tensors take 300 MB of their own, and keep
# libraries mapped that would else be read again and again.
_LEAST_LIMIT_BYTES = 700_000_000
_INTERPRETER_BYTES = 450_000_000
_COMMAND = "diskoffload quantize"
_SUMS = "its arithmetic alone"
_IN_QUANTIZER = (
    "transformers.models.llama.modeling_llama",
    "compressed_tensors.quantization.utils",
)
_NEEDS = ("transformers", "compressed_tensors")


# ---------------------------------------------------------------------- in the child


def quantize(source: str, settle_bytes: int, scratch: str) -> list[Sample]:
    """Run the command, in this process. (An arm's work.)"""
    for name in _IN_QUANTIZER:
        importlib.import_module(name)
    out = Path(scratch, "out")
    host_memory.settle(settle_bytes)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        status = run_command(["quantize", source, str(out), "--scheme", _SCHEME])
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"the command ended with status {status}")
    return [
        Sample("seconds", seconds),
        Sample("command_seconds", time.time() - psutil.Process().create_time()),
        Sample("source_bytes", _size_bytes(Path(source))),
        Sample("result_bytes", _size_bytes(out)),
    ]


def compute(source: str, scratch: str) -> list[Sample]:
    """Quantize each weight when it is in memory; only that is timed. (An arm's work.)"""
    plan = plan_quantization(source, Path(scratch, "out"), _SCHEME)
    wanted = set(plan.quantized)
    scheme = scheme_named(_SCHEME)
    seconds = 0.0
    is_first = True
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in wanted.intersection(file.keys()):
                weight = file.get_tensor(name).clone()
                if is_first:
                    scheme.quantize(name, weight)  # what the first call imports is not arithmetic
                    is_first = False
                started = time.perf_counter()
                scheme.quantize(name, weight)
                seconds += time.perf_counter() - started
    return [Sample("seconds", seconds)]


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    size_bytes = _SIZE_BYTES[place.scale]
    source = place.work_dir / f"llama-{size_bytes}"
    write_checkpoint(source, size_bytes)
    files = sorted(source.glob("*.safetensors"))
    limit_bytes = None if place.no_limits else max(size_bytes // 3, _LEAST_LIMIT_BYTES)
    cold = [] if place.scale == "tiny" else files
    notes = [
        f"A Llama-style bf16 checkpoint of {size_bytes / 1e9:.3g} GB with random weights, cold, "
        f"to {_SCHEME}. The whole command counts python's start and imports, the other time "
        "does not.",
        "I/O: the source's bytes at the raw device's reading speed and the result's at its "
        "writing speed, of the same round. Arithmetic: the same quantizer on each weight in RAM.",
    ]
    settle_bytes = min(size_bytes, (limit_bytes or 1 << 62) - _INTERPRETER_BYTES)
    if host_memory.is_taken_back():
        notes.append(host_memory.NOTE)
    if limit_bytes is None:
        notes.append(f"Without a memory limit, because: {place.no_limits}")
    else:
        notes.append(f"The command and the arithmetic ran in {limit_bytes / 1e6:.0f} MB of memory.")
    return Plan(
        [
            Arm(raw_device.READ_LABEL, "raw_device:read", {"paths": [str(one) for one in files]}),
            Arm(raw_device.WRITE_LABEL, "raw_device:write", {"nbytes": size_bytes // 3}),
            Arm(
                _COMMAND,
                "quantizing:quantize",
                {"source": str(source), "settle_bytes": settle_bytes},
                needs=_NEEDS,
                limit_bytes=limit_bytes,
                cold=cold,
            ),
            Arm(
                _SUMS,
                "quantizing:compute",
                {"source": str(source)},
                needs=_NEEDS,
                limit_bytes=limit_bytes,
                cold=cold,
            ),
        ],
        _ROUNDS[place.scale],
        notes,
    )


def _times_the_larger(
    seconds: float,
    source_bytes: float,
    result_bytes: float,
    read_speed: float,
    write_speed: float,
    sums_seconds: float,
) -> float:
    io_seconds = source_bytes / read_speed + result_bytes / write_speed
    return seconds / max(io_seconds, sums_seconds)


def _judge(results: Results) -> list[Outcome]:
    read = Key(raw_device.READ_LABEL, "bytes_per_second")
    write = Key(raw_device.WRITE_LABEL, "bytes_per_second")
    return [
        outcome(
            "quantize",
            "",
            results.combine,
            _times_the_larger,
            Key(_COMMAND, "seconds"),
            Key(_COMMAND, "source_bytes"),
            Key(_COMMAND, "result_bytes"),
            read,
            write,
            Key(_SUMS, "seconds"),
            raw=[read, write],
        )
    ]


def _panels(results: Results) -> list[Panel]:
    drawn = bars(results, "seconds", None)
    return [Panel("Seconds to quantize, and what it is made of", "seconds", drawn)]


FIGURE = Figure(
    "quantizing",
    "Quantizing a checkpoint larger than memory",
    {
        "seconds": "time",
        "command_seconds": "whole command",
        "source_bytes": "source",
        "result_bytes": "result",
        "bytes_per_second": "speed",
        "moved_bytes": "moved",
    },
    lambda at: f"{at:g}",
    _plan,
    _judge,
    _panels,
)
