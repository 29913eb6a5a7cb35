"""A job's claim to an unfinished result: that it is this job's, and how much of it is done.

The note is renewed every 256 MiB of the result or 30 seconds, after the data was synced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diskoffload.errors import OutputExistsError, listed
from diskoffload.resumable.differences import differences
from diskoffload.resumable.lock import LOCK_NAME
from diskoffload.resumable.note import NEW_NOTE_NAME, read_note, remove_note, write_note
from diskoffload.system.files import Files

# What a kill can cost, beside the tensor in hand. A note is 2 KB, and 30 for a source of 200
# shards. Measured: the seven of a result of 1.6 GB, with what they sync, took 0.15 s of 34.
NOTE_EVERY_BYTES = 256 << 20
NOTE_EVERY_SECONDS = 30.0
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own (stat(2))

_log = logging.getLogger(__name__)


class Claim:
    """One job's claim to a folder in which its result grows; the folder is locked already.

    Attributes:
        identity: all that decides the result's bytes.
        note: what an earlier run of the same job noted; ``None`` if it is the first.
    """

    def __init__(
        self, folder: Path, source: Path, identity: Mapping[str, Any], files: Files
    ) -> None:
        """Look at what an earlier run left; nothing is changed.

        Args:
            folder: where the result grows.
            source: what it is made from.
            identity: all that decides the result's bytes, as :func:`differences` takes it.
            files: the file operations.

        Raises:
            OutputExistsError: the folder belongs to another job; the message says what differs.
            DamagedFileError: the note is damaged.
            StorageError: something cannot be read.
        """
        self._folder = folder
        self._source = str(source)
        self.identity = identity
        self._files = files
        self._unnoted_bytes = 0
        self._noted_seconds = time.monotonic()
        self.note = read_note(folder, files)
        if self.note is None:
            self._check_empty()
        else:
            self._check_same(self.note)

    def _check_empty(self) -> None:
        if not self._folder.exists():
            return
        # Ours, if a run was killed before it had written its first note.
        others = {one.name for one in self._folder.iterdir()} - {LOCK_NAME, NEW_NOTE_NAME}
        if others:
            raise OutputExistsError(
                f"{self._folder} is where the result would grow, and it holds "
                f"{listed(sorted(others))} without a note of whose they are; remove it, or name "
                "another result"
            )

    def _check_same(self, note: dict[str, Any]) -> None:
        told = differences(note["job"], self.identity)
        if told:
            raise OutputExistsError(
                f"{self._folder} holds the unfinished result of another job: {'; '.join(told)}. "
                "Repeat that command, remove the folder, or name another result"
            )
        if note["source"] != self._source:
            _log.info(
                "the source was %s and is %s: length, time and header of every file are the "
                "same, and what was compared of their data, so the work goes on",
                note["source"],
                self._source,
            )

    @property
    def written_bytes(self) -> int:
        """Bytes of the result that lie on disk already."""
        # Blocks, not lengths: a file has its full length from the start.
        found = [path.stat() for path in self._folder.glob("*.safetensors*")]
        return sum(getattr(one, "st_blocks", 0) * _BLOCK_BYTES for one in found)

    def begin(self, progress: Mapping[str, Any]) -> None:
        """Say whose the folder is before anything else is in it, or trust what is in it."""
        if self.note is None:
            self._files.sync_folder(self._folder.parent)
            self.store(progress)
        else:
            # A killed process may not have come to it, and the next note counts on it.
            self._files.sync_folder(self._folder)

    def add(self, nbytes: int) -> None:
        """Take note, in memory, that so many bytes more are written."""
        self._unnoted_bytes += nbytes

    @property
    def is_due(self) -> bool:
        """Whether so much was done, or so long ago, that it should be stored."""
        if not self._unnoted_bytes:
            return False
        waited_seconds = time.monotonic() - self._noted_seconds
        return self._unnoted_bytes >= NOTE_EVERY_BYTES or waited_seconds >= NOTE_EVERY_SECONDS

    def store(self, progress: Mapping[str, Any]) -> None:
        """Write down what is done. All of it must be durable.

        Raises:
            StorageError: the note is as before, or perhaps the new one.
        """
        note = {"source": self._source, **progress, "job": self.identity}
        write_note(self._folder, note, self._files)
        self._unnoted_bytes = 0
        self._noted_seconds = time.monotonic()

    def forget(self, folder: Path) -> None:
        """Remove the note from where it lies now, because the result is complete.

        Raises:
            StorageError: it is still there.
        """
        remove_note(folder, self._files)
        self._files.sync_folder(folder)
