"""Who owns an offload folder, and what is left in it when the owner goes."""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import uuid
import weakref
from collections import Counter
from pathlib import Path
from typing import Protocol

from diskoffload.errors import StorageError
from diskoffload.store.journal import JOURNAL_NAME, NEW_SUFFIX
from diskoffload.store.shard import Shard
from diskoffload.system.files import Files, naming_faults

LOCK_NAME = "diskoffload.lock"
SHARD_PREFIX = "diskoffload-"
_SHARD_NAME = re.compile(r"diskoffload-[0-9a-f]{8}-[0-9]{5,}\.safetensors(\.partial)?")
_log = logging.getLogger(__name__)


class OwnsFolder(Protocol):
    """What owns a folder as long as it is open."""

    @property
    def is_open(self) -> bool:
        """Whether it still writes there."""


class Ownership:
    """This process's right to write in a folder.

    It lasts as long as the folder object or a shard in it; then the lock goes, and the
    folders with it that we made and in which nothing of others is. In a forked child
    nothing of this happens.
    """

    def __init__(self, path: Path, made: tuple[Path, ...], files: Files) -> None:
        """Lock the folder.

        Raises:
            FolderInUseError: another process owns it.
            StorageError: it cannot be locked.
        """
        self.path = path
        self.pid = os.getpid()
        self._user: weakref.ref[OwnsFolder] | None = None
        self._files = files
        self._run = uuid.uuid4().hex[:8]
        self._numbers = itertools.count(1)
        self._shards: weakref.WeakSet[Shard] = weakref.WeakSet()
        # Finalizers take it too, and may run wherever it is held.
        self._lock = threading.RLock()
        # What the finalizers share: the names of the files that stay when nothing refers to
        # them, and how many shards refer to each (one that is reopened beside its writer's).
        self._kept: set[str] = set()
        self._users: Counter[str] = Counter()
        self._released: set[str] = set()
        lock = path / LOCK_NAME
        weakref.finalize(self, _give_up, files, self.pid, files.lock(lock), lock, made)

    @classmethod
    def taken_by(
        cls, user: OwnsFolder, path: Path, made: tuple[Path, ...], files: Files
    ) -> Ownership:
        """Lock a folder for an object that writes there.

        What another object of this process, closed or gone by now, has left in use (tensors
        that are held, an error that is kept) does not lock it out: the two share the right.

        Raises:
            FolderInUseError: another process, or another open object, owns it.
            StorageError: it cannot be locked.
        """
        key = os.path.realpath(path)
        with _taking:
            known = _known.get(key)
            if known is None or known.pid != os.getpid() or not known._is_free():
                known = _known[key] = cls(path, made, files)
            known._user = weakref.ref(user)
            return known

    def _is_free(self) -> bool:
        user = self._user() if self._user is not None else None
        if user is not None and user.is_open:
            return False
        with naming_faults("look at the lock of the folder", self.path):
            return (self.path / LOCK_NAME).exists()

    def next_path(self) -> Path:
        """Give the path of a new shard; no earlier process can have used it."""
        return self.path / f"{SHARD_PREFIX}{self._run}-{next(self._numbers):05d}.safetensors"

    def adopt(self, shard: Shard) -> None:
        """Let a shard's file go when nothing refers to it any more, unless it is kept then."""
        shared = (self._kept, self._users, self._lock)
        with self._lock:  # the writer's thread adds while another lists
            self._users[shard.path.name] += 1
            weakref.finalize(shard, _leave_shard, self._files, self.pid, shard.path, *shared)
            self._shards.add(shard)
        shard.owner = self
        shard.rest()

    def keep(self, names: set[str]) -> None:
        """Have just these files stay; what was kept before goes as soon as nothing uses it.

        What cannot be removed is tried again at the next call, and is left to a sweep in the end.
        """
        self._released |= self._kept - names
        self._released -= names
        self._kept |= names
        self._kept -= self._released
        in_use = {shard.path.name for shard in self.shards()}
        for name in sorted(self._released - in_use):
            if _removed(self._files, self.path / name):
                self._released.discard(name)

    def sweep(self) -> list[Path]:
        """Remove what a process that died has left: shards that are neither kept nor in use.

        A journal that it had begun to rewrite goes as well.
        """
        in_use = {shard.path.name for shard in self.shards()}
        found = [path for path in leftovers(self.path) if path.name not in self._kept | in_use]
        begun = self.path / (JOURNAL_NAME + NEW_SUFFIX)
        if begun.is_file() and not begun.is_symlink():
            found.append(begun)
        for path in found:
            self._files.remove(path)
        return found

    def shards(self) -> list[Shard]:
        """List the shards that are in use, oldest first."""
        with self._lock:
            return sorted(self._shards, key=lambda shard: shard.path.name)


def is_shard_name(name: str) -> bool:
    """Whether a file of that name is a finished shard of an offload folder."""
    return _SHARD_NAME.fullmatch(name) is not None and not name.endswith(".partial")


def leftovers(folder: Path) -> list[Path]:
    """List the shards in a folder, whole or begun, by their names; links are nobody's shards."""
    with naming_faults("list the folder", folder):
        found = [path for path in folder.iterdir() if _SHARD_NAME.fullmatch(path.name)]
        return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _leave_shard(
    files: Files,
    pid: int,
    path: Path,
    kept: set[str],
    users: Counter[str],
    lock: threading.RLock,
) -> None:
    if os.getpid() != pid:
        return
    with lock:
        users[path.name] -= 1
        if users[path.name]:
            return
        del users[path.name]
    if path.name not in kept:
        _removed(files, path)


def _removed(files: Files, path: Path) -> bool:
    try:
        files.remove(path)
    except StorageError as error:
        _log.warning("%s", str(error))  # whoever keeps the record must not keep the frames
        return False
    return True


def _give_up(files: Files, pid: int, fd: int, lock: Path, made: tuple[Path, ...]) -> None:
    if os.getpid() != pid:
        return
    try:
        try:
            files.remove(lock)
            files.remove_folders_if_empty(made)
        finally:
            files.close(fd)
    except StorageError as error:
        _log.warning("%s", str(error))


# A lock is held by the process, so the process must know which ones it holds.
_known: weakref.WeakValueDictionary[str, Ownership] = weakref.WeakValueDictionary()
_taking = threading.Lock()
