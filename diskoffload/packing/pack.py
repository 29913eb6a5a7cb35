"""Compress a checkpoint without loss, file by file, into a folder that opens as it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diskoffload.budget import format_bytes
from diskoffload.checkpoint.fingerprint import fingerprint_of
from diskoffload.checkpoint.publish import WEIGHT_SUFFIXES
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import CheckpointError, DamagedFileError, InvalidInputError, listed
from diskoffload.packing.work import Job, OpenFile, Tensor, carry_out, check_places, left_behind
from diskoffload.resumable.differences import short
from diskoffload.resumable.note import NOTE_NAME
from diskoffload.store.codec import WritingCodec, codec_named, element_bytes_of
from diskoffload.store.compression import AUTO, DEFAULT, Compression, check_compression, way_for
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.header import FILLER_PREFIX
from diskoffload.store.packed_shard import PackedShard
from diskoffload.store.packed_source import SOURCE_KEY, source_of
from diskoffload.store.packing import estimated_share
from diskoffload.store.partial_file import partial_path
from diskoffload.store.payoff import measure_payoff
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.store.value_parts import value_digest
from diskoffload.system.files import Files
from diskoffload.system.memory import empty, tensor_bytes

_log = logging.getLogger(__name__)

# Enough to tell what the tensors of a dtype have to give; a few MiB are read of each.
_MOST_SAMPLED = 16
_SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class PackPlan:
    """What packing would do.

    Attributes:
        source: the checkpoint.
        out: the result's folder.
        packed: names of the tensors that are packed, where that saves a tenth.
        skipped: names of the tensors that are left as they are, because that was chosen.
        files: how many files of weights the result has; as many as the source, of its names.
        read_bytes: of all tensors of the source.
        written_bytes: of the result, about: from samples of every dtype's tensors.
        left_behind: weights in the source's folder that are no part of the checkpoint.
        reason: what was measured, where it was to be found out whether it pays.
        pays: whether it is to be done.
    """

    source: str
    out: str
    packed: list[str]
    skipped: list[str]
    files: int
    read_bytes: int
    written_bytes: int
    left_behind: list[str] = field(default_factory=list)
    reason: str | None = None
    pays: bool = True

    def as_json(self) -> dict[str, Any]:
        """Give it as what :func:`json.dumps` takes; sizes are in bytes."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.source} -> {self.out}",
            f"  read     {format_bytes(self.read_bytes)}",
            f"  written  about {format_bytes(self.written_bytes)} in {self.files} files, all the "
            f"disk it needs ({self.written_bytes / max(1, self.read_bytes):.2f} of what is read)",
            f"  {len(self.packed)} tensors are packed where that saves a tenth, "
            f"{len(self.skipped)} are left as they are",
        ]
        if self.left_behind:
            lines.append(f"  no part of the checkpoint, not copied: {listed(self.left_behind)}")
        if self.reason is not None:
            lines.append(f"  {'it pays' if self.pays else 'it does not pay'}: {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PackResult:
    """What packing did.

    Attributes:
        plan: what was to be done.
        out: the packed checkpoint; ``None`` if it does not pay and nothing was written.
        resumed: how many tensors an earlier, interrupted run had done.
        packed: how many tensors are packed; the others did not save a tenth, or were left.
        written_bytes: of all tensors of the result.
    """

    plan: PackPlan
    out: Path | None
    resumed: int = 0
    packed: int = 0
    written_bytes: int = 0


def plan_packing(
    source: Path | str, out: Path | str, *, compression: Compression = "zstd"
) -> PackPlan:
    """Say what :func:`pack_checkpoint` would do, and do nothing; print the result to see it."""
    return _prepare(source, out, compression)[0]


def pack_checkpoint(
    source: Path | str,
    out: Path | str,
    *,
    compression: Compression = "zstd",
    show_progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> PackResult:
    """Compress a checkpoint without loss; :func:`unpack_checkpoint` gives it back byte for byte.

    Each file of weights becomes one of the same name, whose tensors are packed where that saves
    at least a tenth and are else stored as they are, mappable. Index, config, tokenizer and the
    like are copied. Only this library reads the result: :func:`open_checkpoint` where it lies.
    Everything written is read back, decoded, and compared with checksums of what was read from
    the source, before the folder appears under its name. An interrupted, failed or killed run
    leaves ``OUT.partial``; the same call goes on from there, to the same bytes. One tensor is in
    memory at a time, packed; the source is mapped.

    Args:
        source: a checkpoint's folder, or one safetensors file, beside which nothing is then
            looked at; only read.
        out: the result's folder; must not exist, or be empty.
        compression: ``"zstd"``; ``"auto"`` packs if that pays on the result's disk, and does
            nothing else; or a function that is given each tensor's name and the stored tensor
            (with ``dtype`` and ``shape``), and says ``"zstd"`` or ``True``, or ``None`` or
            ``False`` to leave it as it is.
        show_progress: show a progress bar in bytes, with the time left.
        stop: asked between tensors; when it says true, the work stops there.

    Returns:
        What was done.

    Raises:
        InvalidInputError: no such compression; or ``out`` is a file, or in the source.
        CheckpointError: the source is no checkpoint, or is packed already.
        OutputExistsError: ``out`` is taken, or ``OUT.partial`` is of another job; the message
            says what differs.
        FolderInUseError: another process is writing that result.
        DamagedFileError: the source was changed meanwhile, or what was written is not what is
            read back, or what is noted in ``OUT.partial`` is damaged.
        NoSpaceError: the disk has too little room; found before anything is written, unless
            something else fills it later, or samples misled.
        Interrupted: ``stop`` said so.
    """
    plan, job = _prepare(source, out, compression)
    if not plan.pays:
        _log.info("%s is not packed: %s", plan.source, plan.reason)
        return PackResult(plan, None)
    resumed = carry_out(job, show_progress=show_progress, stop=stop)
    found = Checkpoint(job.out).tensors.values()
    return PackResult(
        plan,
        job.out,
        resumed,
        sum(isinstance(tensor, EncodedTensor) for tensor in found),
        sum(tensor.spec.nbytes for tensor in found),
    )


@dataclass(frozen=True)
class PackFile:
    """One file of the result: a shard of the source, packed.

    Attributes:
        source: the shard.
        tensors: all that it holds, in the order of their bytes.
        packed: names of those that are packed, where that pays.
        codec: how.
    """

    source: Shard
    tensors: Sequence[ShardTensor]
    packed: frozenset[str]
    codec: WritingCodec

    def open(self, path: Path, files: Files, noted: Mapping[str, Any] | None) -> PackedShard:
        """Begin the file, or go on with it."""
        return PackedShard(path, self.source, self.codec, files, noted)

    def write(self, file: OpenFile, tensor: Tensor) -> None:
        """Pack the next tensor."""
        assert isinstance(file, PackedShard)  # of open()
        assert isinstance(tensor, ShardTensor)  # of tensors
        file.add(tensor, packed=tensor.spec.name in self.packed)

    def verify(self, path: Path, files: Files) -> None:
        """Decode all of the file, and compare it with what was read from the source."""
        found = stored_tensors(Shard(path, files))
        expected = source_of(Shard(path, files).header, str(path))
        if expected is None or expected.header.specs != self.source.header.specs:
            raise DamagedFileError(f"{path} does not say that it was packed from this source")
        for name, digest in expected.digests.items():
            if value_digest(found[name]) != digest:
                raise DamagedFileError(f"{path}: {name!r} does not have the value that was read")


def _prepare(source: Path | str, out: Path | str, compression: Compression) -> tuple[PackPlan, Job]:
    """Check every argument, read the headers and some samples, and plan."""
    check_compression(compression)
    if compression is None:
        raise InvalidInputError("compression=None would leave every tensor as it is: name a way")
    target = Path(out).expanduser().resolve()
    checkpoint = Checkpoint(source)
    check_places(checkpoint, target)
    _check_unpacked(checkpoint)
    auto = _Auto(target)
    ways = {name: way_for(compression, name, tensor) for name, tensor in _all_tensors(checkpoint)}
    chosen = {name: DEFAULT if way == AUTO and auto.pays else way for name, way in ways.items()}
    packed = {name for name, way in chosen.items() if way not in (None, AUTO)}
    skipped = sorted(name for name in chosen if name not in packed)
    codec = codec_named(DEFAULT)
    file_jobs = {
        name: PackFile(shard, _in_order(shard), frozenset(packed), codec)
        for name, shard in checkpoint.shards.items()
    }
    tensors = [tensor for one in file_jobs.values() for tensor in one.tensors]
    pays = compression != AUTO or auto.pays
    plan = PackPlan(
        source=str(checkpoint.path),
        out=str(target),
        packed=sorted(packed),
        skipped=skipped,
        files=len(file_jobs),
        read_bytes=sum(tensor.nbytes for tensor in tensors),
        written_bytes=_estimated_bytes(tensors, packed, codec),
        left_behind=left_behind(checkpoint, WEIGHT_SUFFIXES),
        reason=auto.reason,
        pays=pays,
    )
    identity = {
        "command": "pack",
        "form": f"{codec.name} {codec.version}",
        "skipped": short(skipped),
        "source": fingerprint_of(checkpoint),
    }
    job = Job("Packing", checkpoint, target, identity, file_jobs, plan.written_bytes)
    return plan, job


class _Auto:
    """Finds out whether it pays, if that is asked; for a result that was begun it was found."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.reason: str | None = None

    @cached_property
    def pays(self) -> bool:
        if any((place / NOTE_NAME).exists() for place in (self._out, partial_path(self._out))):
            self.reason = "an earlier run found so, and its result is unfinished"
            return True
        place = next(one for one in self._out.parents if one.is_dir())
        found = measure_payoff(place, Files())
        self.reason = str(found)
        return found.pays


def _in_order(shard: Shard) -> list[ShardTensor]:
    found = stored_tensors(shard)
    return [one for one in map(found.get, shard.header.specs) if isinstance(one, ShardTensor)]


def _all_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, ShardTensor]]:
    """Give every tensor of every file, those that the index does not name too."""
    for shard in checkpoint.shards.values():
        yield from ((one.spec.name, one) for one in _in_order(shard))


def _check_unpacked(checkpoint: Checkpoint) -> None:
    for shard in checkpoint.shards.values():
        found = stored_tensors(shard)
        packed = [name for name, one in found.items() if isinstance(one, EncodedTensor)]
        if packed or SOURCE_KEY in shard.header.metadata:
            raise CheckpointError(
                f"{checkpoint.path} is packed already ({shard.path.name} is compressed); it opens "
                "as it is, and `diskoffload unpack` gives back what it was made from"
            )
        if any(name.startswith(FILLER_PREFIX) for name in found):
            raise CheckpointError(
                f"{shard.path} is a file of an offload folder, no checkpoint's; save the model "
                "with save_checkpoint and pack that"
            )


def _estimated_bytes(tensors: Sequence[ShardTensor], packed: set[str], codec: WritingCodec) -> int:
    """Estimate the result's bytes from samples of a few tensors of every dtype."""
    by_dtype: dict[torch.dtype, list[ShardTensor]] = {}
    total = 0
    for tensor in tensors:
        if tensor.spec.name in packed:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        else:
            total += tensor.nbytes
    for dtype, group in by_dtype.items():
        group_bytes = sum(tensor.nbytes for tensor in group)
        samples = sorted(group, key=lambda one: one.nbytes, reverse=True)
        samples = samples[:: max(1, len(samples) // _MOST_SAMPLED)][:_MOST_SAMPLED]
        seen_bytes = sum(tensor.nbytes for tensor in samples)
        kept_bytes = sum(
            tensor.nbytes * _estimated_share(tensor, element_bytes_of(dtype), codec)
            for tensor in samples
        )
        total += int(group_bytes * (kept_bytes / seen_bytes if seen_bytes else 1))
    return total


def _estimated_share(tensor: ShardTensor, element_bytes: int, codec: WritingCodec) -> float:
    """Look at the middle of a tensor, whose edges may be padding."""
    nbytes = min(tensor.nbytes, _SAMPLE_BYTES)
    start = (tensor.nbytes - nbytes) // 2 // element_bytes * element_bytes
    buffer = tensor_bytes(empty(torch.uint8, (nbytes,)))
    tensor.read_value(buffer, start)
    return estimated_share(buffer, element_bytes, codec)
