"""What of a result is done, kept in ``OUT.partial`` so that a later run goes on with it.

The note says whose the folder is, and how many of the source's tensors, in their order, lie
finished and durable in it. It is renewed every 256 MiB of the result or 30 seconds, after
the data was synced. Files that have their final name are finished whatever it says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diskoffload.errors import OutputExistsError, listed
from diskoffload.quantize.identity import differences, identity_of
from diskoffload.quantize.lock import LOCK_NAME
from diskoffload.quantize.note import NEW_NOTE_NAME, read_note, remove_note, write_note
from diskoffload.quantize.plan import Job
from diskoffload.store.shard_writer import Left, left_of

SHARD_METADATA = {"format": "pt"}
# What a kill can cost, beside the tensor in hand. A note is 2 KB, and 30 for a source of 200
# shards. Measured: the seven of a result of 1.6 GB, with what they sync, took 0.15 s of 34.
NOTE_EVERY_BYTES = 256 << 20
NOTE_EVERY_SECONDS = 30.0
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own (stat(2))

_log = logging.getLogger(__name__)


class State:
    """What of a job is done in a folder.

    Attributes:
        done: names of the source's tensors that are.
        published: files of the result that an earlier run had finished.
        kept: by file, the digests of the result's tensors that an earlier run had written to it.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        """Look at what an earlier run left; nothing is changed.

        Raises:
            OutputExistsError: the folder belongs to another job; the message says what differs.
            DamagedFileError: the note is damaged, or the source was changed since it was opened.
            StorageError: something cannot be read.
        """
        self._folder = folder
        self._job = job
        self._identity = identity_of(job)
        self._order = list(job.outputs)
        self._prefix = 0
        self._unnoted_bytes = 0
        self._noted_seconds = time.monotonic()
        self.done: set[str] = set()
        self.published: frozenset[str] = frozenset()
        self.kept: dict[str, dict[str, str]] = {}
        note = read_note(folder, job.files)
        self._is_new = note is None
        if note is None:
            self._check_empty()
        else:
            self._check_same(note)
            self._take_stock(note["done"])
            self._keep(note["digests"])

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
        told = differences(note["job"], self._identity)
        if told:
            raise OutputExistsError(
                f"{self._folder} holds the unfinished result of another job: {'; '.join(told)}. "
                "Repeat that command, remove the folder, or name another result"
            )
        source = str(self._job.checkpoint.path)
        if note["source"] != source:
            _log.info(
                "the source was %s and is %s: length, time and header of every file are the "
                "same, and what was compared of their data, so the work goes on",
                note["source"],
                source,
            )

    def _take_stock(self, noted: int) -> None:
        """Find out what is done: what was noted, or lies in finished files, and is there."""
        job = self._job
        left: dict[str, Left] = {
            file: left_of(self._folder / file, planned, job.files, SHARD_METADATA)
            for file, planned in job.layout.files.items()
        }
        file_of = {p[0]: file for file, planned in job.layout.files.items() for p in planned}
        lost: set[str] = set()
        for number, name in enumerate(self._order):
            files = {file_of[key] for key in job.outputs[name]}
            gone = {file for file in files if left[file] == "nothing"}
            if not gone and (number < noted or all(left[f] == "published" for f in files)):
                self.done.add(name)
            elif number < noted:
                lost |= gone
        if lost:
            _log.warning(
                "%s: %s is gone or was cut off since it was written, and is written again",
                self._folder,
                listed(sorted(lost)),
            )
        self.published = frozenset(file for file, found in left.items() if found == "published")

    def _keep(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        done = {key for name in self.done for key in self._job.outputs[name]}
        for file, known in digests.items():
            if file not in self.published:
                self.kept[file] = {key: known[key] for key in known if key in done}

    @property
    def is_complete(self) -> bool:
        """Whether every tensor is done."""
        return len(self.done) == len(self._order)

    @property
    def written_bytes(self) -> int:
        """Bytes of the result that lie on disk already."""
        # Blocks, not lengths: a file has its full length from the start.
        found = [path.stat() for path in self._folder.glob("*.safetensors*")]
        return sum(getattr(one, "st_blocks", 0) * _BLOCK_BYTES for one in found)

    def begin(self) -> None:
        """Say whose the folder is before anything else is in it, or trust what is in it."""
        if self._is_new:
            self._job.files.sync_folder(self._folder.parent)
            self.store({})
        else:
            # A killed process may not have come to it, and the next note counts on it.
            self._job.files.sync_folder(self._folder)

    def publish(self, file: str) -> None:
        """Take note that a file of the result has its name now, and says the rest itself."""
        self.kept.pop(file, None)

    def add(self, name: str, nbytes: int) -> None:
        """Take note, in memory, that a tensor is done, as so many bytes of the result."""
        self.done.add(name)
        self._unnoted_bytes += nbytes

    @property
    def is_due(self) -> bool:
        """Whether so much was done, or so long ago, that it should be stored."""
        if not self._unnoted_bytes:
            return False
        waited_seconds = time.monotonic() - self._noted_seconds
        return self._unnoted_bytes >= NOTE_EVERY_BYTES or waited_seconds >= NOTE_EVERY_SECONDS

    def store(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Write down what is done. All of it must be durable.

        Args:
            digests: by file, of what was written to those that are being written now.

        Raises:
            StorageError: the note is as before, or perhaps the new one.
        """
        while self._prefix < len(self._order) and self._order[self._prefix] in self.done:
            self._prefix += 1
        note = {
            "source": str(self._job.checkpoint.path),
            "done": self._prefix,
            "of": len(self._order),
            "digests": {**self.kept, **digests},
            "job": self._identity,
        }
        write_note(self._folder, note, self._job.files)
        self._unnoted_bytes = 0
        self._noted_seconds = time.monotonic()

    def forget(self, folder: Path) -> None:
        """Remove the note from where it lies now, because the result is complete.

        Raises:
            StorageError: it is still there.
        """
        remove_note(folder, self._job.files)
        self._job.files.sync_folder(folder)
