"""Who owns an offload folder, and what is left in it when the owner goes."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import uuid
import weakref
from pathlib import Path

from diskoffload.errors import StorageError
from diskoffload.store.shard import Shard
from diskoffload.system.files import Files

LOCK_NAME = "diskoffload.lock"
SHARD_PREFIX = "diskoffload-"
_log = logging.getLogger(__name__)


class Ownership:
    """This process's right to write in a folder.

    It lasts as long as the folder object or a shard in it; then the lock goes, and the
    folder with it if we made it and nothing of others is inside. In a forked child
    nothing of this happens.
    """

    def __init__(self, path: Path, made: bool, files: Files) -> None:
        """Lock the folder.

        Raises:
            FolderInUseError: another process owns it.
            StorageError: it cannot be locked.
        """
        self.path = path
        self.pid = os.getpid()
        self._files = files
        self._run = uuid.uuid4().hex[:8]
        self._numbers = itertools.count(1)
        lock = path / LOCK_NAME
        fd = files.lock(lock)
        self._shards: weakref.WeakSet[Shard] = weakref.WeakSet()
        self._lock = threading.Lock()
        weakref.finalize(self, _give_up, files, self.pid, fd, lock, made)

    def next_path(self) -> Path:
        """Give the path of a new shard; no earlier process can have used it."""
        return self.path / f"{SHARD_PREFIX}{self._run}-{next(self._numbers):05d}.safetensors"

    def adopt(self, shard: Shard) -> None:
        """Let a shard's file go when nothing in it is referred to any more."""
        with self._lock:  # the writer's thread adds while another lists
            self._shards.add(shard)
        shard.rest()
        shard.owner = self
        weakref.finalize(shard, _remove_shard, self._files, self.pid, shard.path)

    def shards(self) -> list[Shard]:
        """List the shards that are in use, oldest first."""
        with self._lock:
            return sorted(self._shards, key=lambda shard: shard.path.name)


def _remove_shard(files: Files, pid: int, path: Path) -> None:
    if os.getpid() != pid:
        return
    try:
        files.remove(path)
    except StorageError as error:
        _log.warning("%s", error)


def _give_up(files: Files, pid: int, fd: int, lock: Path, made: bool) -> None:
    if os.getpid() != pid:
        return
    try:
        files.remove(lock)
        if made:
            files.remove_folder_if_empty(lock.parent)
    except StorageError as error:
        _log.warning("%s", error)
    finally:
        files.close(fd)
