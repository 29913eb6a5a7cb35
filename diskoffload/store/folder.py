"""One offload folder: where offloaded tensors are written to."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diskoffload.errors import (
    ClosedError,
    CommitError,
    DamagedFileError,
    StorageError,
    listed,
)
from diskoffload.store.commits import Commits, Committed, Entry
from diskoffload.store.compression import AUTO, Compression, way_for
from diskoffload.store.journal import Journal
from diskoffload.store.lock import Ownership
from diskoffload.store.payoff import AutoCompression
from diskoffload.store.shard import Shard
from diskoffload.store.writer import Ticket, Writer
from diskoffload.system.files import Files, memory_file_system, naming_faults
from diskoffload.system.headroom import Headroom

# A shard is written when so much waits in memory: enough that many tensors share one,
# little beside what is available, since a second group may wait while one is written.
_MOST_GROUP_BYTES = 256 << 20
_LEAST_GROUP_BYTES = 8 << 20
_GROUP_SHARE = 16
_log = logging.getLogger(__name__)


class Folder:
    """A folder that this process owns and writes shards of offloaded tensors to.

    A shard's file lives as long as a stored tensor of it. Files of others are never
    touched. Without a commit the folder is scratch: nothing of ours stays in it, and folders
    that we made go as well. What was committed stays, until a later commit no longer refers
    to it. What a process that died has left goes when the folder is opened.

    Attributes:
        path: absolute path.
        turn: for who commits: held from looking at the model to the end of the commit.
        remembered: for who commits: by name, what identifies a value in memory, and the entry
            of the file that it was committed to.
        resting: for who commits: notes of what need not be looked at, as the last commit says.

    Thread-safe. After a fork the child neither writes nor removes anything.
    """

    _is_made = False  # of one whose making failed, which the error may keep

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        files: Files | None = None,
        group_bytes: int = 0,
        is_named: bool = True,
    ) -> None:
        """Make the folder if need be, and lock it.

        Args:
            path: the folder; ``None`` takes a fresh one in the system's temporary place.
            files: the file operations, for tests.
            group_bytes: how much is gathered in memory before a shard is written; 0 takes a
                sixteenth of what is available, between 8 and 256 MiB.
            is_named: whether a folder is wanted that its user names; a warning says if not.

        Raises:
            FolderInUseError: another process owns it.
            DamagedFileError: the record of what was committed in it is damaged.
            StorageError: it cannot be made or locked.
        """
        files = files or Files()
        if path is None:
            with naming_faults("make a temporary folder", tempfile.tempdir or "TMPDIR"):
                self.path = Path(tempfile.mkdtemp(prefix="diskoffload-"))
            made: tuple[Path, ...] = (self.path,)
            if is_named:
                _log.warning(
                    "no offload_dir was given: offloading to %s, gone at the end", self.path
                )
        else:
            self.path = Path(path).expanduser().absolute()
            made = files.make_folder(self.path)
        kind = memory_file_system(self.path)
        if kind is not None:
            _log.warning(
                "offload_dir %s lies on a %s file system: that is memory, not disk; "
                "name a folder on a disk to save memory",
                self.path,
                kind,
            )
        self._files = files
        self._commit_lock = threading.Lock()
        self.turn = threading.Lock()
        self.remembered: dict[str, tuple[Any, Entry]] = {}
        self.resting: set[object] = set()
        self._shows: Committed | None = None
        self._durable: set[str] = set()
        self._in_doubt: set[str] = set()
        self._suspect: set[str] = set()
        self._look_at_bytes = _LEAST_GROUP_BYTES
        self._committer: weakref.ref[object] | None = None
        self._reopened: weakref.WeakValueDictionary[str, Shard] = weakref.WeakValueDictionary()
        with naming_faults("open the offload folder", self.path):
            self._take(made)
        if not group_bytes:
            share_bytes = Headroom().available_bytes() // _GROUP_SHARE
            group_bytes = max(_LEAST_GROUP_BYTES, min(_MOST_GROUP_BYTES, share_bytes))
        self._auto_compression = AutoCompression(self.path, files)
        self._writer = Writer(files, self._owner.next_path, self._owner.adopt, group_bytes)
        self._end = weakref.finalize(self, _end_writer, self._writer, self._owner.pid)
        self._is_made = True

    def _take(self, made: tuple[Path, ...]) -> None:
        try:
            self._owner = Ownership.taken_by(self, self.path, made, self._files)
        except BaseException:
            with suppress(StorageError):
                self._files.remove_folders_if_empty(made)
            raise
        self._commits = Commits(Journal(self.path, self._files))
        self._commits.make_durable()
        self._durable.update(self._commits.last.shards)
        self._owner.keep(set(self._durable))
        swept = self._owner.sweep()
        if swept:
            _log.info("removed %d files that a process that died left in %s", len(swept), self.path)

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    @property
    def is_open(self) -> bool:
        """Whether this process may still write here."""
        return self._is_made and self._end.alive and os.getpid() == self._owner.pid

    def put(
        self,
        name: str,
        tensor: torch.Tensor,
        compression: Compression,
        *,
        stays_open: bool = True,
    ) -> Ticket:
        """Queue a tensor for writing under its name; see :meth:`Writer.put`.

        Args:
            name: the name it should have in a file.
            tensor: the value.
            compression: whether to compress it, and how.
            stays_open: whether the folder lives until the value is written or cancelled, even if
                nothing else refers to it.

        Raises:
            ClosedError: the folder was closed, or belongs to the parent process.
            InvalidInputError: a way of compression that is not known.
        """
        self.check_open(name)
        way = way_for(compression, name, tensor)
        codec = self._auto_compression.codec() if way == AUTO else way
        return self._writer.put(name, tensor, codec, self if stays_open else None)

    def check_open(self, name: str) -> None:
        """Raise :class:`ClosedError` if a tensor of this name could not be offloaded now."""
        if self.is_open:  # thousands of times
            return
        self._check_ours(f"offload {name!r} to {self.path}")
        if not self._end.alive:
            raise ClosedError(
                f"cannot offload {name!r} to {self.path}: it was closed; what was offloaded stays "
                "readable, for changes dispatch the model to an open folder"
            )

    def flush(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Write all that is queued and return when it is in the files.

        Args:
            meanwhile: see :meth:`Writer.flush`.

        Raises:
            StorageError: a write failed; its tensors are still queued.
            ClosedError: the folder was closed, or belongs to the parent process.
        """
        self._check_ours(f"write what waits for {self.path}")
        if not self.is_open:
            raise ClosedError(f"cannot write what waits for {self.path}: it was closed")
        self._writer.flush(meanwhile)

    def _check_ours(self, action: str) -> None:
        if os.getpid() != self._owner.pid:
            raise ClosedError(
                f"cannot {action}: it belongs to the process that opened it "
                f"(pid {self._owner.pid}); a forked child can only read"
            )

    def close(self) -> None:
        """Take no more tensors; those on disk stay readable while they are held."""
        self._end()

    # ------------------------------------------------------------------ commits

    @property
    def last_commit(self) -> Committed:
        """What was committed last; its number is 0 if nothing was."""
        return self._shows or self._commits.last

    def show_only(self, committed: Committed) -> None:
        """Take changes, but no commits: the model shows a commit of another's folder."""
        self._shows = committed

    def claim_commits(self, owner: object, *, reopened: bool = False) -> None:
        """Say whose commits come next; what was committed before stays theirs alone.

        Args:
            owner: the model.
            reopened: it was made from the last commit.

        Raises:
            CommitError: the folder holds the commits of another.
        """
        if self._shows is not None:
            raise CommitError(
                "this model was reopened with read_only=True, so its changes have no place to "
                "stay: reopen it without, or keep it with save_checkpoint"
            )
        committer = self._committer() if self._committer is not None else None
        if committer is not owner and not reopened and self.last_commit.number:
            raise CommitError(
                f"{self.path} holds commit {self.last_commit.number} of another model or run: "
                "go on from it with diskoffload.reopen, commit to another offload_dir, or remove "
                "that one"
            )
        self._committer = weakref.ref(owner)

    def has_doubled(self) -> bool:
        """Whether as much was written since this last answered yes as was in use then."""
        written_bytes = self._writer.written_bytes
        if written_bytes < self._look_at_bytes:
            return False
        in_use_bytes = sum(shard.header.file_bytes for shard in self.shards())
        self._look_at_bytes = written_bytes + max(_LEAST_GROUP_BYTES, in_use_bytes)
        return True

    def owns(self, shard: Shard) -> bool:
        """Whether a shard is one of this folder's files."""
        return shard.first.owner is self._owner

    @property
    def suspects(self) -> Set[str]:
        """Names of files of which nobody knows what is on disk: an fsync failed, or one is lost."""
        return self._suspect

    def commit(self, wanted: Committed, shards: Iterable[Shard]) -> Committed:
        """Make a state durable: first the data, then one record that refers to it.

        Args:
            wanted: the state; ``shards`` of it need only say what ``shards`` does not.
            shards: the files of this folder that hold what is new.

        Raises:
            ClosedError: the folder was closed, or belongs to the parent process.
            DamagedFileError: somebody removed or changed a file that the state refers to.
            StorageError: not everything could be made durable. The last commit is what it
                was, nothing of it is removed, and a later call tries again; a file whose
                fsync failed, or that was changed, must be written anew before, see
                :attr:`suspects`.
        """
        self.check_open("a commit")
        with self._commit_lock:
            new = {shard.path.name: shard for shard in shards}
            self._check_there(new, wanted)
            for name in sorted(new.keys() - self._durable):
                self._make_durable(new[name].path)
            self._files.sync_folder(self.path)
            if not self._commits.last.number:
                self._sync_own_name()
            sizes = {
                name: (shard.header.file_bytes, shard.header_digest) for name, shard in new.items()
            }
            # Whichever record is the last on the device after a failure, its files are there.
            self._in_doubt |= sizes.keys()
            self._owner.keep(self._commits.last.shards.keys() | self._in_doubt)
            made = self._commits.write(replace(wanted, shards={**wanted.shards, **sizes}))
            self._in_doubt.clear()
            self._owner.keep(set(made.shards))
            return made

    def _sync_own_name(self) -> None:
        try:
            self._files.sync_folder(self.path.parent)
        except StorageError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):  # one that may only be passed
                raise

    def _check_there(self, new: Mapping[str, Shard], wanted: Committed) -> None:
        lost = [name for name, shard in new.items() if not shard.is_in_place()]
        for name in wanted.shards.keys() - new.keys():
            found = self._files.identity_at(self.path / name)
            if found is None or found[2] != wanted.shards[name][0]:
                lost.append(name)
        if not lost:
            return
        self._suspect.update(lost)
        self._durable.difference_update(lost)
        for name, (_, entry) in list(self.remembered.items()):
            if entry["at"][0] in lost:
                del self.remembered[name]
        raise DamagedFileError(
            f"cannot commit to {self.path}: {listed(sorted(lost))} was removed or changed by "
            "somebody else, and what was committed before may need it; commit again, and what "
            "this process still has of it is written anew"
        )

    def _make_durable(self, path: Path) -> None:
        try:
            with self._files.reading(path) as fd:
                self._files.sync(fd, path)
        except BaseException:
            self._suspect.add(path.name)
            raise
        self._durable.add(path.name)

    def committed_shard(self, name: str) -> Shard:
        """Open a file of the last commit, with a mapping of its own.

        Raises:
            DamagedFileError: it is not the file that was committed.
            StorageError: it cannot be opened.
        """
        shard = self._reopened.get(name)
        if shard is not None:
            return shard.twin()  # another model's: it is not to see this one's edits
        shard = open_committed(self.path, name, self._commits.last, self._files)
        self._owner.adopt(shard)
        self._reopened[name] = shard
        return shard

    def shards(self) -> list[Shard]:
        """List the shards that exist now, oldest first."""
        return self._owner.shards()

    @property
    def written_groups(self) -> int:
        """How many groups were written so far; it grows when tickets were fulfilled."""
        return self._writer.written_groups


def open_committed(folder: Path, name: str, committed: Committed, files: Files) -> Shard:
    """Open a file that a commit refers to.

    Raises:
        DamagedFileError: its length or its header is not what was committed.
        StorageError: it cannot be opened.
    """
    size_bytes, digest = committed.shards[name]
    shard = Shard(folder / name, files)
    if shard.header.file_bytes != size_bytes or shard.header_digest != digest:
        raise DamagedFileError(
            f"{shard.path} is not the file that was committed ({size_bytes} bytes, header "
            f"{digest}): it has {shard.header.file_bytes} bytes, header {shard.header_digest}"
        )
    return shard


def _end_writer(writer: Writer, pid: int) -> None:
    if os.getpid() == pid:
        writer.close()
