"""What quantizing a checkpoint would do, worked out from its headers alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from diskoffload.budget import format_bytes, parse_bytes
from diskoffload.checkpoint.layout import Layout, lay_out
from diskoffload.checkpoint.publish import RECORD_NAME, check_output
from diskoffload.checkpoint.source import CONFIG_NAME, Checkpoint
from diskoffload.errors import (
    BudgetError,
    CheckpointError,
    InvalidInputError,
    UnsupportedTensorError,
    listed,
)
from diskoffload.integrations.quantization import Scheme, already_quantized, scheme_named
from diskoffload.integrations.quantization_targets import Targets, find_targets
from diskoffload.quantize.bands import memory_needed
from diskoffload.resumable.note import NOTE_NAME
from diskoffload.store.header import Planned
from diskoffload.store.stored import ShardTensor
from diskoffload.system.files import Files

_log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPES: tuple[str, ...] = tuple(_DTYPES)
"""Names of the dtypes to which a checkpoint can be converted."""


@dataclass(frozen=True)
class QuantizePlan:
    """What quantizing would do.

    Attributes:
        source: the checkpoint's folder.
        out: the result's folder.
        scheme: its name.
        quantized: names of the weights that are quantized.
        copied: name -> why a tensor is not quantized.
        dtype: what floating tensors are converted to; ``None`` where all stay as stored.
        converted: name -> from which dtype to which a tensor is converted, before it is
            quantized or as it is copied; transformers keeps some wider than ``dtype``.
        read_bytes: of all tensors of the source.
        written_bytes: of all tensors of the result.
        memory_bytes: anonymous memory that the work needs beside the interpreter's.
        shards: how many files the result has.
        is_made: whether the result is there already, so that nothing is left to do.
    """

    source: str
    out: str
    scheme: str
    quantized: list[str]
    copied: dict[str, str]
    dtype: str | None
    converted: dict[str, str]
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    shards: int
    is_made: bool = False

    def as_json(self) -> dict[str, Any]:
        """Give it as what :func:`json.dumps` takes; sizes are in bytes."""
        return asdict(self)

    def __str__(self) -> str:
        reasons = Counter(self.copied.values())
        lines = [
            f"{self.source} -> {self.out} ({self.scheme})",
            f"  read     {format_bytes(self.read_bytes)}",
            f"  written  {format_bytes(self.written_bytes)} in {self.shards} files, "
            "all the disk it needs",
            f"  memory   {format_bytes(self.memory_bytes)} at most beside the interpreter's own",
            f"  {len(self.quantized)} weights are quantized, {len(self.copied)} tensors stay:",
        ]
        lines += [f"    {count:6d}  {reason}" for reason, count in reasons.most_common()]
        if self.dtype is not None:
            lines.append(f"  {len(self.converted)} of all these are converted for {self.dtype}:")
            changes = Counter(self.converted.values())
            lines += [f"    {count:6d}  {change}" for change, count in changes.most_common()]
        if self.is_made:
            lines.append(f"nothing of it is left to do: {self.out} is the result already")
        return "\n".join(lines)


@dataclass
class Job:
    """A plan with what is needed to carry it out.

    Attributes:
        checkpoint: the source.
        tensors: all of it, by name.
        scheme: how weights are quantized.
        targets: which are, and what becomes of the others.
        layout: where the result's tensors go.
        outputs: by a stored tensor's name, the names of what is written in its place.
        bands_bytes: what is in memory of the source may take so much, see ``store.bands``.
        plan: what is told of it.
        files: the file operations.
    """

    checkpoint: Checkpoint
    tensors: dict[str, ShardTensor]
    scheme: Scheme
    targets: Targets
    layout: Layout
    outputs: dict[str, list[str]]
    bands_bytes: int
    plan: QuantizePlan
    files: Files = field(default_factory=Files)


def prepare(
    source: Path | str,
    out: Path | str,
    scheme_name: str,
    ignore: Sequence[str],
    max_memory: int | str | None,
    max_shard_size: int | str,
    dtype: torch.dtype | str | None = None,
) -> Job:
    """Check every argument, read the headers and plan; arguments as of ``quantize_checkpoint``."""
    scheme = scheme_named(scheme_name)
    dtype_name = None if dtype is None else _dtype_name(dtype)
    target = Path(out).expanduser().resolve()
    if not any((target / name).exists() for name in (NOTE_NAME, RECORD_NAME)):  # see is_made
        check_output(target, overwrite=False)
    max_shard_bytes = parse_bytes(max_shard_size)
    checkpoint = Checkpoint(source)
    if target == checkpoint.folder:
        raise InvalidInputError(f"the result cannot be written over its source {target}")
    if not checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.folder} has no {CONFIG_NAME}, so it cannot be known which tensors are "
            "weights of linear layers; put the model's config beside its weights"
        )
    method = already_quantized(checkpoint.config)
    if method is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is quantized already, by {method}; "
            "quantize the checkpoint it was made from"
        )
    wanted = None if dtype_name is None else _DTYPES[dtype_name]
    targets = find_targets(checkpoint.folder, checkpoint.tensors, scheme, ignore, wanted)
    tensors = _unpacked(checkpoint)
    outputs, planned = _planned(tensors, scheme, targets)
    layout = lay_out(planned, max_shard_bytes)
    needed = memory_needed(
        (
            (tensor, targets.dtypes[name], name in targets.weights)
            for name, tensor in tensors.items()
        ),
        scheme,
    )
    budget = None if max_memory is None else parse_bytes(max_memory)
    bands_bytes = needed.bands_bytes(budget)
    memory = needed.fixed_bytes + bands_bytes
    if budget is not None and memory > budget:
        raise BudgetError(
            f"quantizing {checkpoint.path} needs {format_bytes(memory)} at least "
            f"and max_memory is {format_bytes(budget)}; raise it"
        )
    plan = QuantizePlan(
        source=str(checkpoint.path),
        out=str(target),
        scheme=scheme.name,
        quantized=list(targets.weights),
        copied=dict(targets.left),
        dtype=dtype_name,
        converted=_converted(checkpoint, targets),
        read_bytes=checkpoint.size_bytes,
        written_bytes=layout.size_bytes,
        memory_bytes=memory,
        shards=len(layout.files),
    )
    return Job(checkpoint, tensors, scheme, targets, layout, outputs, bands_bytes, plan)


def _unpacked(checkpoint: Checkpoint) -> dict[str, ShardTensor]:
    """Give all tensors, if none of them is packed."""
    tensors: dict[str, ShardTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if not isinstance(tensor, ShardTensor):
            raise UnsupportedTensorError(
                f"{checkpoint.path}: {name!r} is compressed; unpack the checkpoint first, with "
                "`diskoffload unpack`"
            )
        tensors[name] = tensor
    return tensors


def _planned(
    tensors: dict[str, ShardTensor], scheme: Scheme, targets: Targets
) -> tuple[dict[str, list[str]], list[Planned]]:
    """List, for each stored tensor, what is written in its place."""
    outputs: dict[str, list[str]] = {}
    planned: list[Planned] = []
    for name, tensor in tensors.items():
        made = {name: (targets.dtypes[name], tensor.shape)}
        if name in targets.weights:
            made = scheme.outputs(name, tensor.shape, targets.dtypes[name])
        outputs[name] = list(made)
        planned += [(key, dtype, shape) for key, (dtype, shape) in made.items()]
    return outputs, planned


def _dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidInputError(
            f"cannot convert a checkpoint to {dtype!r}; choose one of {', '.join(DTYPES)}"
        )
    return name


def _converted(checkpoint: Checkpoint, targets: Targets) -> dict[str, str]:
    """List what is converted; warn of what may have lost its scale."""
    changes = {
        name: (tensor.dtype, targets.dtypes[name])
        for name, tensor in checkpoint.tensors.items()
        if targets.dtypes[name] != tensor.dtype
    }
    narrow = [name for name, (stored, _) in changes.items() if stored.itemsize == 1]
    if narrow:
        _log.warning(
            "%s: %d tensors are floats of 8 bits and are widened as they are, as transformers "
            "would: %s; if they have scales beside them, quantize the checkpoint they come from",
            checkpoint.path,
            len(narrow),
            listed(narrow),
        )
    return {
        name: f"{str(stored).removeprefix('torch.')} to {str(wanted).removeprefix('torch.')}"
        for name, (stored, wanted) in changes.items()
    }
