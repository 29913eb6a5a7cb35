"""Make again, byte for byte, the files that a packed checkpoint was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diskoffload.budget import format_bytes
from diskoffload.checkpoint.fingerprint import fingerprint_of
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import CheckpointError, DamagedFileError
from diskoffload.packing.work import Job, OpenFile, Tensor, carry_out, check_places
from diskoffload.store.packed_source import PackedSource, source_of
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.store.unpacked_shard import UnpackedShard
from diskoffload.store.value_parts import value_digest
from diskoffload.system.files import Files


@dataclass(frozen=True)
class UnpackPlan:
    """What unpacking would do.

    Attributes:
        source: the packed checkpoint.
        out: the result's folder.
        files: how many files of weights there are.
        read_bytes: of all tensors of the source, packed.
        written_bytes: of all files of weights of the result.
    """

    source: str
    out: str
    files: int
    read_bytes: int
    written_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Give it as what :func:`json.dumps` takes; sizes are in bytes."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.source} -> {self.out}\n"
            f"  read     {format_bytes(self.read_bytes)}\n"
            f"  written  {format_bytes(self.written_bytes)} in {self.files} files, all the disk it "
            "needs"
        )


@dataclass(frozen=True)
class UnpackResult:
    """What unpacking did.

    Attributes:
        plan: what was to be done.
        out: the checkpoint.
        resumed: how many tensors an earlier, interrupted run had done.
    """

    plan: UnpackPlan
    out: Path
    resumed: int


def plan_unpacking(source: Path | str, out: Path | str) -> UnpackPlan:
    """Say what :func:`unpack_checkpoint` would do, and do nothing; print the result to see it."""
    return _prepare(source, out)[0]


def unpack_checkpoint(
    source: Path | str,
    out: Path | str,
    *,
    show_progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> UnpackResult:
    """Give back the checkpoint that :func:`pack_checkpoint` was given, its files byte for byte.

    Every value is compared with the checksum that was taken of it when it was packed, as it is
    decoded and once more as it is read back, before the folder appears under its name. An
    interrupted, failed or killed run leaves ``OUT.partial``; the same call goes on from there.
    Memory does not depend on the checkpoint's size.

    Args:
        source: a packed checkpoint's folder, or one packed file; only read.
        out: the result's folder; must not exist, or be empty.
        show_progress: show a progress bar in bytes, with the time left.
        stop: asked between tensors; when it says true, the work stops there.

    Returns:
        What was done.

    Raises:
        InvalidInputError: ``out`` is a file, or in the source.
        CheckpointError: the source is no checkpoint, or was not packed.
        OutputExistsError: ``out`` is taken, or ``OUT.partial`` is of another job; the message
            says what differs.
        FolderInUseError: another process is writing that result.
        DamagedFileError: the source is damaged, or what was written is not what is read back,
            or what is noted in ``OUT.partial`` is damaged.
        NoSpaceError: the disk has too little room; found before anything is written, unless
            something else fills it later.
        Interrupted: ``stop`` said so.
    """
    plan, job = _prepare(source, out)
    resumed = carry_out(job, show_progress=show_progress, stop=stop)
    return UnpackResult(plan, job.out, resumed)


@dataclass(frozen=True)
class UnpackFile:
    """One file of the result: what a shard of the source was packed from.

    Attributes:
        source: what the shard says of that.
        tensors: all that it holds, in the order of the result's bytes.
    """

    source: PackedSource
    tensors: Sequence[Tensor]

    def open(self, path: Path, files: Files, noted: Mapping[str, Any] | None) -> UnpackedShard:
        """Begin the file, or go on with it."""
        return UnpackedShard(path, self.source, files, noted)

    def write(self, file: OpenFile, tensor: Tensor) -> None:
        """Decode the next tensor."""
        assert isinstance(file, UnpackedShard)  # of open()
        file.add(tensor)

    def verify(self, path: Path, files: Files) -> None:
        """Compare all of the file with what was packed."""
        shard = Shard(path, files)
        head = bytearray(shard.header.data_offset)
        shard.read_at(0, memoryview(head))
        if head != self.source.head:
            raise DamagedFileError(f"{path} does not have the header of the file that was packed")
        # Not as the source's own metadata has it, which may be of a file that was edited since.
        for name, spec in shard.header.specs.items():
            if value_digest(ShardTensor(shard, spec)) != self.source.digests[name]:
                raise DamagedFileError(f"{path}: {name!r} does not have the value that was packed")


def _prepare(source: Path | str, out: Path | str) -> tuple[UnpackPlan, Job]:
    """Check every argument, read the headers and plan."""
    target = Path(out).expanduser().resolve()
    checkpoint = Checkpoint(source)
    check_places(checkpoint, target)
    file_jobs = {name: _unpack_file(shard) for name, shard in checkpoint.shards.items()}
    plan = UnpackPlan(
        source=str(checkpoint.path),
        out=str(target),
        files=len(file_jobs),
        read_bytes=sum(one.spec.nbytes for each in file_jobs.values() for one in each.tensors),
        written_bytes=sum(each.source.header.file_bytes for each in file_jobs.values()),
    )
    identity = {"command": "unpack", "source": fingerprint_of(checkpoint)}
    return plan, Job("Unpacking", checkpoint, target, identity, file_jobs, plan.written_bytes)


def _unpack_file(shard: Shard) -> UnpackFile:
    found = stored_tensors(shard)
    source = source_of(shard.header, str(shard.path))
    if source is None:
        raise CheckpointError(
            f"{shard.path} does not say what it was packed from, so it was not written by "
            "`diskoffload pack` and is not for `diskoffload unpack`"
        )
    for name, spec in source.header.specs.items():
        if name not in found or found[name].nbytes != spec.nbytes:
            raise DamagedFileError(
                f"{shard.path} was packed from a file with {name!r} of {spec.nbytes} bytes "
                "and does not hold that; restore it from a copy"
            )
    return UnpackFile(source, [found[name] for name in source.header.specs])
