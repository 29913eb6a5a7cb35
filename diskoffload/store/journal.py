"""The journal of an offload folder: an append-only file of records, each with its checksum.

One record is one line, in plain text so that it can be looked at::

    <xxh3-64 of the rest, 16 hex digits> <length of the JSON, 8 hex digits> <JSON>\n

Records are numbered from 1. A record counts once it is whole: what a kill or a power cut
leaves of the last one (a part of it, or blocks of zeros) is as good as not there. A whole
record whose checksum is wrong, or one out of order, is damage, and named.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.system.files import Files, naming_faults

JOURNAL_NAME = "diskoffload.journal"
NEW_SUFFIX = ".new"
_FRAME_BYTES = 16 + 1 + 8 + 1
# Rewritten once it is twice as long as what is alive in it, and not for less than this.
_LEAST_DEAD_BYTES = 64 << 10

Record = dict[str, Any]


class Journal:
    """One folder's journal. Not thread-safe: who commits holds a lock.

    After a failed write or fsync the file is never appended to again, for nobody can know what
    of it is on the device: the next record goes into a new file, with all that is alive.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        """Start with whatever file there is, without looking at it; see :meth:`read`."""
        self.path = folder / JOURNAL_NAME
        self._files = files
        self._nbytes = 0
        self._count = 0
        self._rewrite_at_bytes = 0

    def read(self) -> list[Record]:
        """Give the records of the file, oldest first; none where there is no file.

        Raises:
            DamagedFileError: a record is not what was written. Nothing is changed.
            StorageError: the file cannot be read.
        """
        with naming_faults("look for the journal", self.path):
            if not self.path.exists():
                return []
        data = self._files.read(self.path)
        records: list[Record] = []
        start = 0
        while start < len(data):
            frame = data[start : start + _FRAME_BYTES]
            stop = start + _FRAME_BYTES + _length(frame)
            line = data[start : stop + 1]
            if not _is_whole(line, data[start:], stop - start):
                break
            records.append(self._parsed(line, start, len(records) + 1))
            start = stop + 1
        self._nbytes, self._count = start, len(records)
        # What follows is torn: never write after it.
        self._rewrite_at_bytes = 0 if start < len(data) else 2 * len(data) + _LEAST_DEAD_BYTES
        return records

    def _parsed(self, line: bytes, start: int, number: int) -> Record:
        where = f"{self.path}: record {number} at offset {start}"
        if line[-1:] != b"\n" or _checksum(line[17:-1]) + b" " != line[:17]:
            raise DamagedFileError(
                f"{where} is damaged: its checksum is wrong, and it was not cut off by a crash; "
                "restore the file from a copy, or remove the folder and begin anew"
            )
        try:
            record = json.loads(line[_FRAME_BYTES:-1])
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(f"{where} is not JSON ({error})") from error
        if not isinstance(record, dict) or record.get("record") != number:
            raise DamagedFileError(f"{where} is not number {number}; records are missing before it")
        return record

    @property
    def must_be_rewritten(self) -> bool:
        """Whether the next record has to hold all that is alive, see :meth:`rewrite`."""
        return self._nbytes >= self._rewrite_at_bytes

    def append(self, record: Record) -> None:
        """Add a record durably.

        Raises:
            StorageError: the record is not, or perhaps not, on the device.
        """
        assert not self.must_be_rewritten
        line = _line({**record, "record": self._count + 1})
        # Until all of it is done, whatever interrupts us: what is written is in doubt.
        rewrite_at_bytes, self._rewrite_at_bytes = self._rewrite_at_bytes, 0
        fd = self._files.open_for_writing(self.path)
        try:
            self._files.write(fd, memoryview(line), self._nbytes, self.path)
            self._files.sync(fd, self.path)
        except BaseException:
            with suppress(StorageError):  # else a reader may take it for committed
                self._files.set_size(fd, self._nbytes, self.path)
            raise
        finally:
            self._files.close(fd)
        self._nbytes += len(line)
        self._count += 1
        self._rewrite_at_bytes = rewrite_at_bytes

    def rewrite(self, record: Record) -> None:
        """Put one record, which says all that is alive, in the place of all others, durably.

        Raises:
            StorageError: the old records are still there, or perhaps the new one.
        """
        line = _line({**record, "record": 1})
        new = self.path.with_name(self.path.name + NEW_SUFFIX)
        self._rewrite_at_bytes = 0
        self._files.remove(new)
        fd = self._files.create(new)
        try:
            try:
                self._files.write(fd, memoryview(line), 0, new)
                self._files.sync(fd, new)
            finally:
                self._files.close(fd)
            self._files.rename(new, self.path)
        except BaseException:
            with suppress(StorageError):
                self._files.remove(new)
            raise
        self._files.sync_folder(self.path.parent)
        self._nbytes, self._count = len(line), 1
        self._rewrite_at_bytes = 2 * len(line) + _LEAST_DEAD_BYTES


def _checksum(rest: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(rest).encode("ascii")


def _line(record: Record) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    rest = b"%08x %s" % (len(text), text)
    return _checksum(rest) + b" " + rest + b"\n"


def _length(frame: bytes) -> int:
    try:
        return int(frame[17:25], 16)
    except ValueError:
        return 0


def _is_whole(line: bytes, rest: bytes, length: int) -> bool:
    """Whether a record was written to its end; if not, it and all after it was never committed."""
    if 0 in rest:  # JSON has no zeros: blocks that never reached the device
        return b"\n" in line and 0 not in line and len(line) == length + 1
    return len(line) == length + 1 or rest.endswith(b"\n")
