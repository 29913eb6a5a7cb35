"""What of a result is done, kept in ``OUT.partial`` so that a later run goes on with it.

The note says how many of the source's tensors, in their order, lie finished and durable in it.
Files that have their final name are finished whatever it says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from diskoffload.errors import listed
from diskoffload.quantize.identity import identity_of
from diskoffload.quantize.plan import Job
from diskoffload.resumable.claim import Claim
from diskoffload.store.shard_writer import Left, left_of

SHARD_METADATA = {"format": "pt"}

_log = logging.getLogger(__name__)


class State:
    """What of a job is done in a folder.

    Attributes:
        claim: to the folder.
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
        self.claim = Claim(folder, job.checkpoint.path, identity_of(job), job.files)
        self._order = list(job.outputs)
        self._prefix = 0
        self.done: set[str] = set()
        self.published: frozenset[str] = frozenset()
        self.kept: dict[str, dict[str, str]] = {}
        if self.claim.note is not None:
            self._take_stock(self.claim.note["done"])
            self._keep(self.claim.note["digests"])

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

    def begin(self) -> None:
        """Say whose the folder is before anything else is in it, or trust what is in it."""
        self.claim.begin(self._progress({}))

    def publish(self, file: str) -> None:
        """Take note that a file of the result has its name now, and says the rest itself."""
        self.kept.pop(file, None)

    def add(self, name: str, nbytes: int) -> None:
        """Take note, in memory, that a tensor is done, as so many bytes of the result."""
        self.done.add(name)
        self.claim.add(nbytes)

    def store(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Write down what is done. All of it must be durable.

        Args:
            digests: by file, of what was written to those that are being written now.

        Raises:
            StorageError: the note is as before, or perhaps the new one.
        """
        self.claim.store(self._progress(digests))

    def _progress(self, digests: Mapping[str, Mapping[str, str]]) -> dict[str, object]:
        while self._prefix < len(self._order) and self._order[self._prefix] in self.done:
            self._prefix += 1
        return {
            "done": self._prefix,
            "of": len(self._order),
            "digests": {**self.kept, **digests},
        }
