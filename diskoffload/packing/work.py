"""Write the files of a checkpoint in another form: one by one, resumable, read back, published.

A file is written tensor by tensor to ``OUT.partial``, has its name when it is complete, and is
done when it was read back and every value compared with the checksum of what was read from the
source. The note names the files that are done, and how far the open one is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diskoffload.checkpoint.publish import check_output, check_space
from diskoffload.checkpoint.source import Checkpoint
from diskoffload.errors import CheckpointError, DamagedFileError, InvalidInputError, StorageError
from diskoffload.progress import byte_bar
from diskoffload.resumable.claim import Claim
from diskoffload.resumable.finish import finish
from diskoffload.resumable.interrupted import Interrupted
from diskoffload.resumable.lock import FolderLock
from diskoffload.resumable.note import NOTE_NAME
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.partial_file import partial_path
from diskoffload.store.read_ahead import ReadAhead
from diskoffload.store.stored import ShardTensor
from diskoffload.system.files import Files

_log = logging.getLogger(__name__)

Tensor = ShardTensor | EncodedTensor


class OpenFile(Protocol):
    """A file of the result while it is written."""

    @property
    def done(self) -> list[str]:
        """Names of the tensors that were written."""

    @property
    def written_bytes(self) -> int:
        """Bytes of the file so far."""

    def note(self) -> dict[str, Any]:
        """Give what is needed to go on, as :func:`json.dumps` takes it."""

    def sync(self) -> None:
        """Make durable what was written."""

    def leave(self) -> None:
        """Close the file and leave what was synced of it."""

    def publish(self) -> None:
        """Complete the file and give it its name."""


class FileJob(Protocol):
    """One file of the result: what goes into it, and how."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The source's tensors, in the order in which they are written."""

    def open(self, path: Path, files: Files, noted: Mapping[str, Any] | None) -> OpenFile:
        """Begin the file, or go on with it."""

    def write(self, file: OpenFile, tensor: Tensor) -> None:
        """Write the next tensor."""

    def verify(self, path: Path, files: Files) -> None:
        """Read the complete file back; raise :class:`DamagedFileError` if it is not right."""


@dataclass
class Job:
    """A result that is to be written.

    Attributes:
        title: what is done, for the progress bar and messages.
        checkpoint: the source.
        out: the result's folder.
        identity: all that decides the result's bytes.
        file_jobs: by name, the files of the result.
        needed_bytes: of disk, about.
        files: the file operations.
    """

    title: str
    checkpoint: Checkpoint
    out: Path
    identity: Mapping[str, Any]
    file_jobs: Mapping[str, FileJob]
    needed_bytes: int
    files: Files = field(default_factory=Files)

    @property
    def own_files(self) -> dict[str, bytes]:
        """What stands beside the weights, but for what is copied as it is: the index."""
        index = self.checkpoint.index
        return {} if index is None else {index.name: self.files.read(index)}

    @property
    def side_folder(self) -> Path | None:
        """From where config, tokenizer and the like come; a lone file has none."""
        checkpoint = self.checkpoint
        return checkpoint.folder if checkpoint.path == checkpoint.folder else None

    @property
    def partial(self) -> Path:
        """Where the result grows."""
        return partial_path(self.out)


def check_places(checkpoint: Checkpoint, out: Path) -> None:
    """Refuse a result's name that is taken, or that lies in the source.

    Raises:
        OutputExistsError: something is there.
        InvalidInputError: it is a file, or in the source's folder.
    """
    if not (out / NOTE_NAME).exists():  # one that was killed at its last step has a note
        check_output(out, overwrite=False)
    if out.is_relative_to(checkpoint.path.resolve()):
        raise InvalidInputError(
            f"the result cannot be written to {out}: that is in its source, "
            f"{checkpoint.path}, to which nothing is ever written; name another folder"
        )


def carry_out(job: Job, *, show_progress: bool, stop: Callable[[], bool]) -> int:
    """Do a job, or what is left of it.

    Args:
        job: the job.
        show_progress: show a progress bar in bytes, each counted as it is written and as it is
            read back.
        stop: asked between tensors; when it says true, the work stops there.

    Returns:
        How many tensors an earlier run had done.

    Raises:
        OutputExistsError: the result's name is taken, or what grows there is of another job.
        FolderInUseError: another process is writing that result.
        DamagedFileError: the source, or what was written, is not what it should be.
        NoSpaceError: the disk has too little room.
        StorageError: a file cannot be read or written.
        Interrupted: ``stop`` said so.
    """
    if (job.out / NOTE_NAME).exists():
        return _end_after_all(job)
    if not job.partial.exists():
        check_space(job.out, job.needed_bytes)  # before anything is written, the lock too
    with FolderLock(job.partial, job.files) as lock:
        check_output(job.out, overwrite=False)  # another process may have just ended
        work = _Work(job, job.partial)
        check_space(job.out, max(0, job.needed_bytes - work.claim.written_bytes))
        work.claim.begin(work.progress())
        resumed = work.count_done()
        total_bytes = sum(one.nbytes for each in job.file_jobs.values() for one in each.tensors)
        with byte_bar(2 * total_bytes, job.title, show=show_progress) as bar:
            resumed += work.run(bar, stop)
        own = job.own_files
        finish(job.partial, job.out, own, job.side_folder, job.files, lock, work.claim)
    return resumed


def _end_after_all(job: Job) -> int:
    """Take the note out of a result whose process was killed before it could."""
    with FolderLock(job.out, job.files) as lock:
        work = _Work(job, job.out)
        if work.count_done() < sum(len(each.tensors) for each in job.file_jobs.values()):
            check_output(job.out, overwrite=False)
        lock.release()
        work.claim.forget(job.out)
    return work.count_done()


class _Work:
    """The writing itself, file after file."""

    def __init__(self, job: Job, folder: Path) -> None:
        """Look at what an earlier run left; nothing is changed."""
        self._job = job
        self._folder = folder
        self.claim = Claim(folder, job.checkpoint.path, job.identity, job.files)
        note = self.claim.note or {}
        self._ahead = ReadAhead()
        self._done: dict[str, int] = {}
        self._open: OpenFile | None = None
        self._open_name = ""
        self._noted: Mapping[str, Any] | None = None  # of a file that is not open yet
        for name, file_bytes in note.get("files", {}).items():
            if self._has(folder / name, file_bytes):
                self._done[name] = file_bytes
            else:
                self._tell_of_loss(name)
        is_open = note.get("open")
        if is_open is not None and is_open["file"] not in self._done:
            name = is_open["file"]
            if self._has(partial_path(folder / name), is_open["bytes"], exactly=False):
                self._noted = is_open
            elif not (folder / name).exists():
                self._tell_of_loss(name)

    def _has(self, path: Path, file_bytes: int, *, exactly: bool = True) -> bool:
        found = self._job.files.identity_at(path)
        return found is not None and (found[2] == file_bytes if exactly else found[2] >= file_bytes)

    def _tell_of_loss(self, name: str) -> None:
        _log.warning(
            "%s: %s is gone or was cut off since it was written, and is written again",
            self._folder,
            name,
        )

    def count_done(self) -> int:
        """Tell how many tensors need not be written again."""
        jobs = self._job.file_jobs
        count = sum(len(jobs[name].tensors) for name in self._done)
        if self._open is not None:
            return count + len(self._open.done)
        return count + (0 if self._noted is None else int(self._noted["count"]))

    def progress(self) -> dict[str, Any]:
        """Give what the note is to say of it."""
        is_open = self._noted
        if self._open is not None:
            is_open = {
                "file": self._open_name,
                "bytes": self._open.written_bytes,
                "count": len(self._open.done),
                "progress": self._open.note(),
            }
        jobs = self._job.file_jobs
        total = sum(len(each.tensors) for each in jobs.values())
        return {"done": self.count_done(), "of": total, "files": self._done, "open": is_open}

    def run(self, bar: Any, stop: Callable[[], bool]) -> int:
        """Do what is not done yet; give how many tensors lay in files that were only not noted.

        Raises:
            Interrupted: ``stop`` said so; what is done is kept.
        """
        found = 0
        for name, file_job in self._job.file_jobs.items():
            nbytes = sum(tensor.nbytes for tensor in file_job.tensors)
            if name in self._done:
                bar.update(2 * nbytes)
                continue
            if self._is_whole(name, file_job):
                found += len(file_job.tensors)
                bar.update(2 * nbytes)
            else:
                self._write(name, file_job, bar, stop)
                self._verify(name, file_job)
                bar.update(nbytes)
            self._done[name] = (self._folder / name).stat().st_size
            self.claim.store(self.progress())
        return found

    def _is_whole(self, name: str, file_job: FileJob) -> bool:
        """Find out whether a killed run had completed a file, and no more."""
        path = self._folder / name
        if not path.exists():
            return False
        try:
            file_job.verify(path, self._job.files)
        except DamagedFileError as error:
            _log.warning("%s, which an earlier run left, is written again: %s", path, error)
            self._job.files.remove(path)
            return False
        return True

    def _verify(self, name: str, file_job: FileJob) -> None:
        path = self._folder / name
        try:
            file_job.verify(path, self._job.files)
        except DamagedFileError as error:
            self._job.files.remove(path)  # else it would be trusted, or block the next run
            raise DamagedFileError(
                f"{path} was just written, and what is read back is something else: {error}; the "
                "file was removed, and the same command writes it again; do not trust this disk "
                "or memory before it is known why"
            ) from error

    def _write(self, name: str, file_job: FileJob, bar: Any, stop: Callable[[], bool]) -> None:
        noted = None
        if self._noted is not None and self._noted["file"] == name:
            noted = self._noted["progress"]
        path = self._folder / name
        self._open, self._open_name = file_job.open(path, self._job.files, noted), name
        self._noted = None
        try:
            self._write_tensors(self._open, file_job, bar, stop)
            self._open.publish()
        except BaseException:
            self._keep(self._open)
            raise
        self._open = None

    def _write_tensors(
        self, file: OpenFile, file_job: FileJob, bar: Any, stop: Callable[[], bool]
    ) -> None:
        tensors = file_job.tensors
        done = len(file.done)
        bar.update(sum(tensor.nbytes for tensor in tensors[:done]))
        for tensor in self._ahead.through(tensors[done:], lambda tensor: [tensor]):
            if stop():
                raise Interrupted(
                    f"stopped after {self.count_done()} of {self.progress()['of']} tensors; what "
                    f"is done lies in {self._folder}: the same command goes on from there"
                )
            before = file.written_bytes
            file_job.write(file, tensor)
            self.claim.add(file.written_bytes - before)
            bar.update(tensor.nbytes)
            if self.claim.is_due:
                file.sync()
                self.claim.store(self.progress())

    def _keep(self, file: OpenFile) -> None:
        """Leave an unfinished file so that a later run goes on with it."""
        try:
            file.sync()
            self.claim.store(self.progress())
        except StorageError as error:
            _log.warning(
                "what was done since the last note could not be noted, and will be done again: %s",
                error,
            )
        finally:
            with suppress(StorageError):  # what was noted was synced
                file.leave()


def left_behind(checkpoint: Checkpoint, suffixes: frozenset[str]) -> list[str]:
    """List weights in the source's folder that are no part of the checkpoint."""
    if checkpoint.path != checkpoint.folder:
        return []
    try:
        names = sorted(one.name for one in checkpoint.folder.iterdir() if one.suffix in suffixes)
    except OSError as error:
        raise CheckpointError(f"could not list {checkpoint.folder}: {error}") from error
    return [name for name in names if name not in checkpoint.shards]
