"""What it costs to read a weight again, and to run a small layer, when all is warm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from . import ways
from .arms import Arm
from .checkpoints import Checkpoint, Spec, made, there
from .figure import Figure, Outcome, Panel, Place, Plan, bars, outcome, sizes
from .gauges import per_call_seconds
from .results import Key, Results, Sample

_SIDE = 16
_TENSORS = {"tiny": (4, 20), "short": (10, 5000), "full": (10, 5000)}
_ROUNDS = {"tiny": 1, "short": 2, "full": 9}
_LABELS = (
    ways.PLAIN,
    ways.OURS,
    ways.OURS_STREAMED,
    ways.OURS_WRITTEN,
    ways.CT_CPU,
    ways.CT_DISK,
    ways.CT_DISK_WRITTEN,
    ways.ACCELERATE,
)
_FROM_MEMORY = (ways.OURS_WRITTEN, ways.CT_CPU, ways.CT_DISK_WRITTEN)


# ---------------------------------------------------------------------- in the child


def measure(label: str, folders: Sequence[str], scratch: str) -> list[Sample]:
    """Time a read and a forward of one layer among many, for each checkpoint. (An arm's work.)"""
    ways.warm_up(label, scratch)
    found = []
    for number, folder in enumerate(folders):
        place = Path(scratch, str(number))
        place.mkdir()
        found += read_and_run(label, there(folder), place)
    return found


def read_and_run(label: str, checkpoint: Checkpoint, place: Path) -> list[Sample]:
    """Time them for one checkpoint."""
    at = float(checkpoint.spec.tensors)
    layer = checkpoint.spec.layers // 2
    model = _held(label, checkpoint, layer, place)
    module = model.get_submodule(str(layer))
    inputs = torch.randn(1, checkpoint.spec.side)
    with torch.no_grad():
        _check(module(inputs), inputs, checkpoint, layer)
        found = [Sample("forward_seconds", _forward_seconds(module, inputs), at)]
        # Of accelerate's modules it is a real tensor inside of forward only.
        if not module.weight.is_meta:
            found.append(Sample("weight_seconds", weight_seconds(module), at))
    return found


def weight_seconds(module: torch.nn.Module) -> float:
    """Time a read of a layer's weight."""
    return per_call_seconds("module.weight", module=module)


def _forward_seconds(module: torch.nn.Module, inputs: torch.Tensor) -> float:
    return per_call_seconds("module(inputs)", module=module, inputs=inputs)


def _held(label: str, checkpoint: Checkpoint, layer: int, place: Path) -> torch.nn.Module:
    if label not in _FROM_MEMORY:
        return ways.open_as(label, checkpoint, place)
    model = ways.open_as(ways.PLAIN, checkpoint, place)
    # A file a tensor: reading one does not depend on how many others there are.
    is_one_of_many = label == ways.CT_DISK_WRITTEN
    offloaded = model.get_submodule(str(layer)) if is_one_of_many else model
    ways.offload_from_memory(label, offloaded, place)()
    return model


def _check(outputs: torch.Tensor, inputs: torch.Tensor, checkpoint: Checkpoint, layer: int) -> None:
    """Hold what a layer gave against its values on disk: nothing else is worth timing."""
    names = [f"{layer}.weight", f"{layer}.bias"]
    files = checkpoint.file_of()
    with safe_open(str(files[names[0]]), framework="pt") as file:
        weight, bias = (file.get_tensor(name) for name in names)
    torch.testing.assert_close(outputs, torch.nn.functional.linear(inputs, weight, bias))


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    specs = [Spec(count // 2, _SIDE, bias=True) for count in _TENSORS[place.scale]]
    folders = [str(made(place.work_dir, spec).folder) for spec in specs]
    return Plan(
        [
            Arm(
                label,
                "access:measure",
                {"label": label, "folders": folders},
                needs=ways.NEEDS.get(label, ()),
            )
            for label in _LABELS
            if label != ways.OURS_STREAMED or ways.can_stream()
        ],
        _ROUNDS[place.scale],
        [
            f"A Linear({_SIDE}, {_SIDE}) with a bias, in the middle of a model of so many tensors; "
            "all files are in the page cache. Under no_grad, one row of input.",
            "Where nothing is said of it, the tensors lie in one checkpoint that is used in "
            "place; offloaded from memory, each library wrote its own files.",
            "accelerate has a weight inside of forward only, so it has no time for reading one.",
        ],
    )


def _judge(results: Results) -> list[Outcome]:
    found = []
    for at in sizes(results, "weight_seconds"):
        for ours, peer in (
            (ways.OURS, ways.CT_DISK),
            (ways.OURS_WRITTEN, ways.CT_DISK_WRITTEN),
        ):
            detail = f"{_at_words(at or 0)}, {'checkpoint' if ours == ways.OURS else 'offloaded'}"
            weight = "weight_seconds"
            found += [
                outcome(
                    target,
                    detail,
                    results.ratio,
                    Key(ours, metric, at),
                    Key(ways.PLAIN, metric, at),
                )
                for target, metric in (("read", weight), ("forward", "forward_seconds"))
            ]
            found.append(
                outcome(
                    "read-peer", detail, results.ratio, Key(peer, weight, at), Key(ours, weight, at)
                )
            )
    return found


def _panels(results: Results) -> list[Panel]:
    return [
        Panel(f"{title}, {_at_words(at or 0)}", metric, bars(results, metric, at), log=True)
        for at in sizes(results, "forward_seconds")
        for metric, title in (
            ("weight_seconds", "Reading .weight"),
            ("forward_seconds", f"Running Linear({_SIDE}, {_SIDE})"),
        )
    ]


def _at_words(at: float) -> str:
    return f"{at:,.0f} tensors"


FIGURE = Figure(
    "access",
    "Reading a weight that is warm",
    {"weight_seconds": "reading `.weight`", "forward_seconds": "a forward"},
    _at_words,
    _plan,
    _judge,
    _panels,
    on_disk=False,
)
