"""Quantize a checkpoint tensor by tensor, from its files straight into the result's files.

No model is loaded: the meta model says which stored tensors are weights of linear layers,
each of those is read, quantized and written, and everything else is copied, a band of some
MiB after the other. What is to have another dtype is converted on the way. Final shards are
written once, into ``OUT.partial``, which becomes ``OUT`` at the end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diskoffload.budget import format_bytes
from diskoffload.checkpoint.publish import RECORD_NAME, check_output, check_space
from diskoffload.checkpoint.source import CONFIG_NAME
from diskoffload.errors import StorageError
from diskoffload.progress import byte_bar
from diskoffload.quantize.bands import cut
from diskoffload.quantize.config import config_of_result
from diskoffload.quantize.convert import Conversion
from diskoffload.quantize.made import is_made
from diskoffload.quantize.plan import Job, QuantizePlan, prepare
from diskoffload.quantize.state import SHARD_METADATA, State
from diskoffload.resumable.claim import Claim
from diskoffload.resumable.finish import finish
from diskoffload.resumable.interrupted import Interrupted
from diskoffload.resumable.lock import FolderLock
from diskoffload.resumable.note import NOTE_NAME, note_text
from diskoffload.store.bands import Band, through
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.store.stored import ShardTensor
from diskoffload.system.headroom import Headroom
from diskoffload.system.memory import tensor_bytes

_log = logging.getLogger(__name__)

# What is in memory of the source takes no larger share of what is available: the rest is for the
# work and, in a container, for the page cache of the libraries that do it.
_AVAILABLE_SHARE = 3


@dataclass(frozen=True)
class QuantizeResult:
    """What quantizing did.

    Attributes:
        plan: what was to be done.
        out: the finished checkpoint.
        resumed: how many tensors an earlier run had done; all of them if the result was there.
    """

    plan: QuantizePlan
    out: Path
    resumed: int


def quantize_checkpoint(
    source: Path | str,
    out: Path | str,
    scheme: str,
    *,
    ignore: Sequence[str] = ("lm_head",),
    max_memory: int | str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    show_progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> QuantizeResult:
    """Quantize a checkpoint, data-free and round-to-nearest, some MiB of it in memory at a time.

    The arithmetic and the format are compressed-tensors', so transformers and vLLM load the
    result. Every weight of a linear layer is quantized, those of a mixture's experts
    included. An interrupted, failed or killed run leaves ``OUT.partial``; the same call goes on
    from there, to the same bytes.

    Args:
        source: a checkpoint's folder; only read.
        out: the result's folder; must not exist, or be empty. If it holds the result of the
            very same job nothing is left to do.
        scheme: ``"W8A16"``, ``"W4A16"`` or ``"FP8"``.
        ignore: modules that stay as they are: names, or patterns after ``"re:"``.
        max_memory: bytes that may be taken beside the interpreter's, or as ``"1GiB"``; less is read
            ahead if it is little, and too little is refused before the start.
        max_shard_size: largest file of the result.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``: do as if the checkpoint were
            stored as ``from_pretrained(dtype=...)`` loads it. Weights are converted before
            they are quantized, so that scales have that dtype, other floats as they are
            copied; what transformers keeps in float32 stays so. ``None``: as stored.
        show_progress: show a progress bar in bytes, with the time left.
        stop: asked between weights; when it says true, the work stops there.

    Returns:
        What was done.

    Raises:
        InvalidInputError: an unknown scheme, a pattern that cannot be read, a ``dtype`` that
            is none of the three.
        CheckpointError: the source is none, or is quantized already.
        OutputExistsError: ``out`` is taken, or ``OUT.partial`` is of another job; the message
            says what differs.
        FolderInUseError: another process is writing that result.
        DamagedFileError: what is noted in ``OUT.partial`` is damaged.
        BudgetError: ``max_memory`` is less than what is needed at least.
        NoSpaceError: the disk has too little room; found before anything is written, unless
            something else fills it later.
        Interrupted: ``stop`` said so.
    """
    job = prepare(source, out, scheme, ignore, max_memory, max_shard_size, dtype)
    return carry_out(job, show_progress=show_progress, stop=stop)


def plan_quantization(
    source: Path | str,
    out: Path | str,
    scheme: str,
    *,
    ignore: Sequence[str] = ("lm_head",),
    max_memory: int | str | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
) -> QuantizePlan:
    """Say what :func:`quantize_checkpoint` would do, and do nothing; print the result to see it."""
    job = prepare(source, out, scheme, ignore, max_memory, max_shard_size, dtype)
    return replace(job.plan, is_made=is_made(job))


def carry_out(
    job: Job, *, show_progress: bool = False, stop: Callable[[], bool] = lambda: False
) -> QuantizeResult:
    """Do what was planned, or what is left of it; see :func:`quantize_checkpoint`."""
    out = Path(job.plan.out)
    partial = out.with_name(out.name + ".partial")
    if (out / NOTE_NAME).exists():
        return _end_after_all(job, out)
    if is_made(job):
        return QuantizeResult(replace(job.plan, is_made=True), out, len(job.outputs))
    if not partial.exists():
        check_space(out, job.plan.written_bytes)  # before anything is written, the lock too
    with FolderLock(partial, job.files) as lock:
        check_output(out, overwrite=False)  # another process may have just ended
        state = State(partial, job)
        check_space(out, max(0, job.plan.written_bytes - state.claim.written_bytes))
        state.begin()
        _log.info(
            "quantizing %s to %s: some MiB at a time, read past the page cache; at most %s beside "
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
        own, source = _own_files(job, state.claim), job.checkpoint.folder
        finish(partial, out, own, source, job.files, lock, state.claim)
    return QuantizeResult(job.plan, out, resumed)


def _own_files(job: Job, claim: Claim) -> dict[str, bytes]:
    """Give what is written beside the weights."""
    config = json.dumps(config_of_result(job), indent=2) + "\n"
    record = note_text({"job": claim.identity})
    made = {CONFIG_NAME: config.encode("utf-8"), RECORD_NAME: record.encode("utf-8")}
    index = job.layout.index_json()
    if index is not None:
        made[job.layout.index_name] = index.encode("utf-8")
    return made


def _end_after_all(job: Job, out: Path) -> QuantizeResult:
    """Take the note out of a result whose process was killed before it could."""
    with FolderLock(out, job.files) as lock:
        if not (out / NOTE_NAME).exists():
            check_output(out, overwrite=False)
        state = State(out, job)
        if not state.is_complete:
            check_output(out, overwrite=False)
        lock.release()
        state.claim.forget(out)
    return QuantizeResult(job.plan, out, len(state.done))


class _Work:
    """The writing itself: tensor after tensor, each into the file it belongs to."""

    def __init__(self, job: Job, folder: Path, state: State) -> None:
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
        tensors = list(self._job.tensors.values())
        available_bytes = Headroom().available_bytes()
        most_bytes = min(self._job.bands_bytes, available_bytes // _AVAILABLE_SHARE)
        coming = through(tensors, self._bands, most_bytes)
        try:
            for number, (tensor, bands) in enumerate(coming):
                name = tensor.spec.name
                if name not in self._state.done:
                    if stop():
                        raise Interrupted(
                            f"stopped after {number} of {len(tensors)} tensors; what is done lies "
                            f"in {self._folder}: the same command goes on from there"
                        )
                    self._write(name, tensor, bands)
                    self._state.add(name, self._written_bytes(name))
                self._count_off(name)
                if self._state.claim.is_due:
                    self._store()
                bar.update(tensor.spec.nbytes)
        except BaseException:
            self._keep()
            raise

    def _bands(self, tensor: ShardTensor) -> list[ShardTensor]:
        """Cut a tensor that is not done yet: a weight by its rows, anything else anywhere."""
        if tensor.spec.name in self._state.done:
            return []
        return cut(tensor, by_rows=tensor.spec.name in self._job.targets.weights)

    def _written_bytes(self, name: str) -> int:
        writers = {key: self._writers.get(self._file_of[key]) for key in self._job.outputs[name]}
        return sum(one.header.specs[key].nbytes for key, one in writers.items() if one)

    def _write(self, name: str, tensor: ShardTensor, bands: Iterator[Band]) -> None:
        conversion = Conversion(tensor, self._job.targets.dtypes[name])
        if name in self._job.targets.weights:
            self._quantize(name, tensor, bands, conversion)
        else:
            self._copy(name, tensor, bands, conversion)
        conversion.end()

    def _quantize(
        self, name: str, tensor: ShardTensor, bands: Iterator[Band], conversion: Conversion
    ) -> None:
        scheme, dtype = self._job.scheme, self._job.targets.dtypes[name]
        rows_key = self._job.outputs[name][0]
        one = scheme.begin(name, tensor.shape, dtype)
        for band in bands:
            rows = one.add(conversion.convert(band.value()))
            if self._is_wanted(rows_key):
                self._writer(rows_key).write_part(rows_key, tensor_bytes(rows))
        for key, value in scheme.end(name, tensor.shape, one).items():
            if self._is_wanted(key):
                self._writer(key).write(key, tensor_bytes(value))

    def _is_wanted(self, key: str) -> bool:
        # A weight may end in another file than it begins in, and that be finished.
        return self._file_of[key] not in self._state.published

    def _copy(
        self, name: str, tensor: ShardTensor, bands: Iterator[Band], conversion: Conversion
    ) -> None:
        writer = self._writer(name)
        for band in bands:
            writer.write_part(name, tensor_bytes(conversion.convert(band.value())))
        if tensor.spec.nbytes and self._job.targets.dtypes[name] == tensor.dtype:
            tensor.checking().compare(writer.digests[name])

    def _writer(self, key: str) -> ShardWriter:
        file = self._file_of[key]
        if file not in self._writers:
            self._writers[file] = ShardWriter.resumed(
                self._folder / file,
                self._job.layout.files[file],
                self._job.files,
                SHARD_METADATA,
                finished=self._state.kept.get(file, {}),
            )
        return self._writers[file]

    def _count_off(self, name: str) -> None:
        """Publish the files that a tensor was the last of."""
        for key in self._job.outputs[name]:
            file = self._file_of[key]
            self._left[file] -= 1
            if not self._left[file] and file not in self._state.published:
                self._writer(key).publish()
                del self._writers[file]
                self._state.publish(file)

    def _store(self) -> None:
        """Note what is done, once it is durable."""
        for writer in self._writers.values():
            writer.sync()
        self._state.store({file: one.digests for file, one in self._writers.items()})

    def _keep(self) -> None:
        """Leave unfinished files so that a later run goes on with them."""
        try:
            self._store()
        except StorageError as error:
            _log.warning(
                "what was done since the last note could not be noted, and will be done again: %s",
                error,
            )
        finally:
            for writer in self._writers.values():
                with suppress(StorageError):  # what was noted was synced
                    writer.leave()
