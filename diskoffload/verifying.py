"""Check what lies on disk against the checksums that were written with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diskoffload.budget import format_bytes
from diskoffload.checkpoint.fingerprint import check_fingerprint
from diskoffload.checkpoint.source import INDEX_SUFFIX, Checkpoint
from diskoffload.errors import CheckpointError, InvalidInputError, OffloadError
from diskoffload.progress import byte_bar
from diskoffload.store.commits import Commits, Committed
from diskoffload.store.digests import check_header
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.folder import open_committed
from diskoffload.store.header import FILLER_PREFIX
from diskoffload.store.journal import JOURNAL_NAME, Journal
from diskoffload.store.marker import MARKER_NAME
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, stored_tensors
from diskoffload.system.files import Files, naming_faults

# How often a commit that is replaced while it is read is read again.
_MOST_TRIES = 20


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
        file: the file.
        tensor: the tensor in it, if it is one tensor's.
        offset: first byte of that tensor in the file.
        reason: what is wrong, and what to do.
    """

    file: str
    tensor: str | None
    offset: int | None
    reason: str


@dataclass
class Verification:
    """What was checked, and what was found.

    Attributes:
        path: the folder or file.
        commit: number of the last commit; 0 if there is none.
        files: how many files were looked at.
        checked: how many tensors' bytes were compared with their checksum.
        checked_bytes: how many bytes that were.
        unchecked: how many tensors have no checksum, because others wrote them; their
            headers were checked.
        faults: what is wrong; empty if nothing is.
    """

    path: str
    commit: int = 0
    files: int = 0
    checked: int = 0
    checked_bytes: int = 0
    unchecked: int = 0
    faults: list[Fault] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Give all of it as what :func:`json.dumps` takes; sizes are in bytes."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.files} files, {self.checked} tensors compared with their "
            f"checksums ({format_bytes(self.checked_bytes)})"
        ]
        if self.commit:
            lines[0] += f", commit {self.commit}"
        if self.unchecked:
            lines.append(f"{self.unchecked} tensors have no checksum: only headers were checked")
        for fault in self.faults:
            lines.append(f"DAMAGED {fault.reason}")
        lines.append(f"{len(self.faults)} faults" if self.faults else "no fault was found")
        return "\n".join(lines)


def verify(
    path: Path | str, *, source: Path | str | None = None, show_progress: bool = False
) -> Verification:
    """Check an offload folder, a checkpoint's folder or one safetensors file.

    Every header is checked, and every tensor that has a checksum is read and compared. In an
    offload folder the journal is checked too, that every committed file is there and is the
    one that was committed, and that the source checkpoint is still what it was. Nothing is
    changed; a folder in use may be verified, where a file that goes meanwhile is no fault.

    Args:
        path: what to check.
        source: where the checkpoint is that an offload folder's commit belongs to, if it was
            moved since; times of change may differ then, as of :func:`diskoffload.reopen`.
        show_progress: show a progress bar in bytes, with the time left.

    Raises:
        CheckpointError: the path does not exist, or has nothing to check.
        InvalidInputError: a source is named, and nothing there belongs to one.
    """
    place = Path(path).expanduser().absolute()
    if not place.exists():
        raise CheckpointError(f"{place} does not exist: give a folder or a safetensors file")
    found = Verification(str(place))
    with naming_faults("list the folder", place):
        is_file = place.is_file()
        paths = [place] if is_file else sorted(p for p in place.iterdir() if _is_shard(p))
    has_journal = any((place / name).exists() for name in (JOURNAL_NAME, MARKER_NAME))
    if not paths and not has_journal:
        raise CheckpointError(f"{place} has no *.safetensors file and no journal to check")
    if has_journal:
        _verify_commits(place, found, source)
    elif source is not None:
        raise InvalidInputError(
            f"nothing was committed in {place}, so it belongs to no checkpoint; leave "
            f"source={str(source)!r} out"
        )
    elif place.is_dir() and next(place.glob(f"*{INDEX_SUFFIX}"), None) is not None:
        _noting(found, str(place), lambda: Checkpoint(place))
    shards = list(_opened(paths, found))
    total_bytes = sum(tensor.spec.nbytes for _, tensor in shards if tensor.digest is not None)
    with byte_bar(total_bytes, "Verifying", show=show_progress) as bar:
        for shard, tensor in shards:
            if tensor.digest is None:
                found.unchecked += not tensor.spec.name.startswith(FILLER_PREFIX)
                continue
            found.checked += 1
            found.checked_bytes += tensor.spec.nbytes
            spec, digest = tensor.spec, tensor.digest
            try:
                shard.verify(spec, digest)
            except OffloadError as error:
                if shard.path.exists():
                    found.faults.append(Fault(str(shard.path), spec.name, spec.offset, str(error)))
            bar.update(spec.nbytes)
    return found


def _is_shard(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _opened(
    paths: list[Path], found: Verification
) -> Iterator[tuple[Shard, ShardTensor | EncodedTensor]]:
    for one in paths:
        opened: list[tuple[Shard, ShardTensor | EncodedTensor]] = []

        def open_one(one: Path = one, opened: list[Any] = opened) -> None:
            shard = Shard(one, Files())
            check_header(shard.header, str(one))
            opened.extend((shard, tensor) for tensor in stored_tensors(shard).values())

        found.files += 1
        _noting(found, str(one), open_one)
        yield from opened


def _noting(found: Verification, file: str, action: Callable[[], object]) -> None:
    try:
        action()
    except OffloadError as error:
        if Path(file).exists() and not any(file == fault.file for fault in found.faults):
            found.faults.append(Fault(file, None, None, str(error)))


def _verify_commits(place: Path, found: Verification, source: Path | str | None) -> None:
    """Check the last commit; if its owner commits meanwhile, the one after it."""
    journal = Journal(place, Files())
    for _ in range(_MOST_TRIES):
        try:
            last = Commits(journal).last
        except OffloadError as error:
            found.faults.append(Fault(str(journal.path), None, None, str(error)))
            return
        found.commit = last.number
        if source is not None and last.source is None:
            raise InvalidInputError(
                f"the commit in {place} belongs to no checkpoint; leave source={str(source)!r} out"
            )
        faults = [*_faults_of(place, last), *_faults_of_source(last, source)]
        try:
            is_the_last = Commits(journal).last.number == found.commit
        except OffloadError:
            continue  # named at the next try
        if is_the_last:
            break
    found.faults += faults


def _faults_of(place: Path, last: Committed) -> Iterator[Fault]:
    keys: dict[str, set[str]] = {}
    for name in last.shards:
        try:
            keys[name] = set(open_committed(place, name, last, Files()).header.specs)
        except OffloadError as error:
            yield Fault(str(place / name), None, None, str(error))
    for name, entry in last.entries.items():
        at = entry["at"]
        if isinstance(at, list) and at[0] in keys and at[1] not in keys[at[0]]:
            reason = f"{place / at[0]} does not hold {at[1]!r}, which was committed as {name!r}"
            yield Fault(str(place / at[0]), at[1], None, reason)


def _faults_of_source(last: Committed, named: Path | str | None) -> Iterator[Fault]:
    if last.source is None:
        return
    before = Path(last.source["path"])
    place = before if named is None else Path(named).expanduser().absolute()
    try:
        if not place.exists():
            raise CheckpointError(
                f"the commit belongs to the checkpoint {place}, which is not there; name the place "
                "it was moved to as source (--source)"
            )
        moved_from = None if named is None else before
        check_fingerprint(Checkpoint(place), last.source["files"], moved_from=moved_from)
    except OffloadError as error:
        yield Fault(str(place), None, None, str(error))
