"""Quantize a checkpoint tensor by tensor, from its files straight into the result's files.

No model is loaded: the meta model says which stored tensors are weights of linear layers,
each of those is mapped, quantized and written, and everything else is copied inside the
kernel. Final shards are written once, into ``OUT.partial``, which becomes ``OUT`` at the end.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from diskoffload.budget import format_bytes, parse_bytes
from diskoffload.checkpoint.layout import Layout, lay_out
from diskoffload.checkpoint.publish import check_output, check_space, copy_side_files, write_text
from diskoffload.checkpoint.source import CONFIG_NAME, Checkpoint
from diskoffload.errors import (
    BudgetError,
    CheckpointError,
    InvalidInputError,
    OutputExistsError,
    UnsupportedTensorError,
)
from diskoffload.integrations.quantization import Scheme, already_quantized, scheme_named
from diskoffload.integrations.quantization_targets import Targets, find_targets
from diskoffload.progress import byte_bar
from diskoffload.store.header import Planned
from diskoffload.store.shard import ShardWriter, tensor_bytes
from diskoffload.store.stored import EncodedTensor, ShardTensor
from diskoffload.system.files import Files

_log = logging.getLogger(__name__)
STATE_NAME = "diskoffload-quantize.json"
# What quantizing one weight takes beside its result (see Scheme.quantize), rounded up.
_SCRATCH_BYTES = 48 << 20
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own (stat(2))


@dataclass(frozen=True)
class QuantizePlan:
    """What quantizing would do.

    Attributes:
        source: the checkpoint's folder.
        out: the result's folder.
        scheme: its name.
        quantized: names of the weights that are quantized.
        copied: name -> why a tensor stays as it is.
        read_bytes: of all tensors of the source.
        written_bytes: of all tensors of the result.
        memory_bytes: anonymous memory that the work needs beside the interpreter's.
        shards: how many files the result has.
    """

    source: str
    out: str
    scheme: str
    quantized: list[str]
    copied: dict[str, str]
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    shards: int

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
        return "\n".join(lines)


@dataclass(frozen=True)
class QuantizeResult:
    """What quantizing did.

    Attributes:
        plan: what was to be done.
        out: the finished checkpoint.
        resumed: how many weights an earlier, interrupted run had done.
    """

    plan: QuantizePlan
    out: Path
    resumed: int


@dataclass
class _Job:
    """A plan with what is needed to carry it out."""

    checkpoint: Checkpoint
    scheme: Scheme
    targets: Targets
    layout: Layout
    outputs: dict[str, list[str]]
    plan: QuantizePlan
    files: Files = field(default_factory=Files)


class Interrupted(KeyboardInterrupt):
    """Quantizing was asked to stop and did, between two weights; its message says how to go on."""


def plan_quantization(
    source: Path | str,
    out: Path | str,
    scheme: str,
    *,
    ignore: Sequence[str] = ("lm_head",),
    max_memory: int | str | None = None,
    max_shard_size: int | str = "5GB",
) -> QuantizePlan:
    """Say what :func:`quantize_checkpoint` would do, and do nothing; print the result to see it."""
    return _prepare(source, out, scheme, ignore, max_memory, max_shard_size).plan


def quantize_checkpoint(
    source: Path | str,
    out: Path | str,
    scheme: str,
    *,
    ignore: Sequence[str] = ("lm_head",),
    max_memory: int | str | None = None,
    max_shard_size: int | str = "5GB",
    show_progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> QuantizeResult:
    """Quantize a checkpoint, data-free and round-to-nearest, one weight in memory at a time.

    The arithmetic and the format are compressed-tensors', so transformers and vLLM load the
    result. Every weight of a linear layer is quantized, those of a mixture's experts
    included. An interrupted run leaves ``OUT.partial``; the same call goes on from there.

    Args:
        source: a checkpoint's folder; only read.
        out: the result's folder; must not exist, or be empty.
        scheme: ``"W8A16"``, ``"W4A16"`` or ``"FP8"``.
        ignore: modules that stay as they are: names, or patterns after ``"re:"``.
        max_memory: bytes that may be taken, or as ``"1GiB"``; checked before the start.
        max_shard_size: largest file of the result.
        show_progress: show a progress bar in bytes, with the time left.
        stop: asked between weights; when it says true, the work stops there.

    Returns:
        What was done.

    Raises:
        InvalidInputError: an unknown scheme, a pattern that cannot be read.
        CheckpointError: the source is none, or is quantized already.
        OutputExistsError: ``out`` is taken, or ``OUT.partial`` is of another job.
        BudgetError: one weight does not fit ``max_memory``.
        NoSpaceError: the disk has too little room; found before anything is written.
        Interrupted: ``stop`` said so.
    """
    job = _prepare(source, out, scheme, ignore, max_memory, max_shard_size)
    target = Path(job.plan.out)
    partial = target.with_name(target.name + ".partial")
    state = _State(partial, job)
    check_space(target, max(0, job.plan.written_bytes - state.written_bytes))
    state.begin()
    _log.info(
        "quantizing %s to %s: one weight at a time, mapped from the source; at most %s beside "
        "the interpreter's memory; the result grows in %s",
        job.checkpoint.path,
        job.scheme.name,
        format_bytes(job.plan.memory_bytes),
        partial,
    )
    resumed = len(state.done)
    title = f"Quantizing to {job.scheme.name}"
    with byte_bar(job.plan.read_bytes, title, show=show_progress) as bar:
        _Work(job, partial, state).run(bar, stop)
    _finish(job, partial, target, state)
    return QuantizeResult(job.plan, target, resumed)


# ---------------------------------------------------------------------- preparing


def _prepare(
    source: Path | str,
    out: Path | str,
    scheme_name: str,
    ignore: Sequence[str],
    max_memory: int | str | None,
    max_shard_size: int | str,
) -> _Job:
    scheme = scheme_named(scheme_name)
    target = Path(out).expanduser().absolute()
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
    targets = find_targets(checkpoint.folder, checkpoint.tensors, scheme, ignore)
    outputs, planned = _planned(checkpoint, scheme, targets)
    layout = lay_out(planned, max_shard_bytes)
    memory = _memory_bytes(checkpoint, scheme, targets)
    budget = None if max_memory is None else parse_bytes(max_memory)
    if budget is not None and memory > budget:
        raise BudgetError(
            f"quantizing {checkpoint.path} needs {format_bytes(memory)} for its largest weight "
            f"and max_memory is {format_bytes(budget)}; raise it"
        )
    plan = QuantizePlan(
        source=str(checkpoint.path),
        out=str(target),
        scheme=scheme.name,
        quantized=list(targets.weights),
        copied=dict(targets.left),
        read_bytes=checkpoint.size_bytes,
        written_bytes=layout.size_bytes,
        memory_bytes=memory,
        shards=len(layout.files),
    )
    return _Job(checkpoint, scheme, targets, layout, outputs, plan)


def _planned(
    checkpoint: Checkpoint, scheme: Scheme, targets: Targets
) -> tuple[dict[str, list[str]], list[Planned]]:
    """List, for each stored tensor, what is written in its place."""
    outputs: dict[str, list[str]] = {}
    planned: list[Planned] = []
    for name, tensor in checkpoint.tensors.items():
        if not isinstance(tensor, ShardTensor):
            raise UnsupportedTensorError(
                f"{checkpoint.path}: {name!r} is compressed; unpack the checkpoint first"
            )
        made = {name: (tensor.dtype, tensor.shape)}
        if name in targets.weights:
            made = scheme.outputs(name, tensor.shape, tensor.dtype)
        outputs[name] = list(made)
        planned += [(key, dtype, shape) for key, (dtype, shape) in made.items()]
    return outputs, planned


def _memory_bytes(checkpoint: Checkpoint, scheme: Scheme, targets: Targets) -> int:
    largest = 0
    for name in targets.weights:
        tensor = checkpoint.tensors[name]
        made = scheme.outputs(name, tensor.shape, tensor.dtype).values()
        largest = max(
            largest, sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in made)
        )
    return largest + _SCRATCH_BYTES


# ---------------------------------------------------------------------- working


class _State:
    """What of a job lies finished in ``OUT.partial``, and whether it is this job's."""

    def __init__(self, folder: Path, job: _Job) -> None:
        self._folder = folder
        self._path = folder / STATE_NAME
        self._files = job.files
        self._identity = _identity(job)
        self.done: set[str] = set()
        if not folder.exists():
            return
        found = self._read()
        if found.get("job") != self._identity:
            raise OutputExistsError(
                f"{folder} is there and belongs to another source, scheme or ignore list; "
                "remove it, or name another result"
            )
        self.done = set(found.get("done", ()))

    @property
    def written_bytes(self) -> int:
        """Bytes of the result that lie on disk already."""
        if not self._folder.exists():
            return 0
        # Blocks, not lengths: a file has its full length from the start.
        found = [path.stat() for path in self._folder.glob("*.safetensors*")]
        return sum(getattr(one, "st_blocks", 0) * _BLOCK_BYTES for one in found)

    def begin(self) -> None:
        """Make the folder and say whose it is."""
        if self._files.make_folder(self._folder):
            self.store(())

    def store(self, done: Iterable[str]) -> None:
        """Write down which tensors are done, durably and at one stroke."""
        new = self._path.with_suffix(".new")
        self._files.remove(new)
        text = json.dumps({"job": self._identity, "done": list(done)}, indent=1)
        write_text(new, text, self._files)
        self._files.rename(new, self._path)
        self._files.sync_folder(self._folder)

    def forget(self) -> None:
        """Remove the note, because the result is complete."""
        self._files.remove(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _identity(job: _Job) -> dict[str, Any]:
    shards = {
        name: [shard.header.file_bytes, shard.path.stat().st_mtime_ns]
        for name, shard in job.checkpoint.shards.items()
    }
    return {
        "source": str(job.checkpoint.path),
        "shards": shards,
        "scheme": job.scheme.name,
        "ignored": list(job.targets.ignore),
        "quantized": len(job.targets.weights),
        "files": {name: len(planned) for name, planned in job.layout.files.items()},
    }


class _Work:
    """The writing itself: tensor after tensor, each into the file it belongs to."""

    def __init__(self, job: _Job, folder: Path, state: _State) -> None:
        self._job = job
        self._folder = folder
        self._state = state
        files = job.layout.files
        self._file_of = {planned[0]: file for file, items in files.items() for planned in items}
        self._left = {file: len(items) for file, items in files.items()}
        self._writers: dict[str, ShardWriter] = {}

    def run(self, bar: Any, stop: Callable[[], bool]) -> None:
        """Do what is not done yet.

        Raises:
            Interrupted: ``stop`` said so; what is done is kept.
        """
        tensors = list(self._job.checkpoint.tensors.values())
        try:
            for number, (tensor, following) in enumerate(
                zip(tensors, [*tensors[1:], None], strict=True)
            ):
                name = tensor.spec.name
                if name not in self._state.done:
                    if stop():
                        self._suspend(number)
                    if following is not None:
                        following.shard.prefetch(following.spec)
                    self._write(name, tensor)
                self._count_off(name)
                bar.update(tensor.spec.nbytes)
        finally:
            for writer in self._writers.values():
                writer.abandon()

    def _write(self, name: str, tensor: ShardTensor | EncodedTensor) -> None:
        assert isinstance(tensor, ShardTensor)  # checked when the job was planned
        if name not in self._job.targets.weights:
            tensor.shard.copy_to(tensor.spec, self._writer(name), name)
            return
        tensor.shard.check_unchanged()
        weight = tensor.mapped()
        made = self._job.scheme.quantize(name, tensor.load() if weight is None else weight)
        for key, value in made.items():
            self._writer(key).write(key, tensor_bytes(value))
        tensor.shard.drop_behind(tensor.spec)

    def _writer(self, key: str) -> ShardWriter:
        file = self._file_of[key]
        if file not in self._writers:
            job = self._job
            finished = {key for name in self._state.done for key in job.outputs[name]}
            self._writers[file] = ShardWriter.resumed(
                self._folder / file,
                job.layout.files[file],
                job.files,
                {"format": "pt"},
                finished=finished,
            )
        return self._writers[file]

    def _count_off(self, name: str) -> None:
        """Publish the files that a tensor was the last of, and note what is then durable."""
        published = False
        for key in self._job.outputs[name]:
            file = self._file_of[key]
            self._left[file] -= 1
            if not self._left[file] and file in self._writers:
                self._writers.pop(file).publish()
                published = True
        if published:
            # What lies in a file that is still being written would not survive a power cut.
            self._state.store(one for one in self._job.outputs if not self._is_ahead(one))

    def _is_ahead(self, name: str) -> bool:
        return any(self._left[self._file_of[key]] for key in self._job.outputs[name])

    def _suspend(self, number: int) -> None:
        for file in list(self._writers):
            self._writers.pop(file).suspend()
        names = list(self._job.checkpoint.tensors)
        self._state.store(names[:number])
        raise Interrupted(
            f"stopped after {number} of {len(names)} tensors; what is done lies in "
            f"{self._folder}: the same command goes on from there"
        )


def _finish(job: _Job, partial: Path, out: Path, state: _State) -> None:
    index = job.layout.index_json()
    files = job.files
    if index is not None:
        files.remove(partial / job.layout.index_name)
        write_text(partial / job.layout.index_name, index, files)
    config = dict(job.checkpoint.config)
    config["quantization_config"] = job.scheme.quantization_config(job.targets.ignore)
    files.remove(partial / CONFIG_NAME)
    write_text(partial / CONFIG_NAME, json.dumps(config, indent=2) + "\n", files)
    copy_side_files(job.checkpoint.folder, partial)
    state.forget()
    files.sync_folder(partial)
    if out.is_dir():
        files.remove_folder_if_empty(out)
    files.rename(partial, out)
    files.sync_folder(out.parent)
