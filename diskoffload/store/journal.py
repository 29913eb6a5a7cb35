"""The journal of an offload folder: an append-only file of records, each with its checksum.

One record is one line, in plain text so that it can be looked at::

    <xxh3-64 of the rest, 16 hex digits> <length of the JSON, 8 hex digits> <JSON>\n

Records are numbered from 1. A record counts once it is whole: what a kill or a power cut
leaves of the last one (a part of it, or blocks of zeros) is as good as not there. A whole
record whose checksum is wrong, or one out of order, is damage, and named.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.marker import Marker
from diskoffload.system.files import Files, naming_faults

JOURNAL_NAME = "diskoffload.journal"
NEW_SUFFIX = ".new"
_FRAME_BYTES = 16 + 1 + 8 + 1
# Rewritten once it is twice as long as what is alive in it, and not for less than this.
_LEAST_DEAD_BYTES = 64 << 10

# A journal of 50,000 tensors has 6.5 MB, and at most three times as much before it is rewritten.
_MOST_BYTES = 512 << 20
# What a device writes at once: of a torn record whole ones are missing.
_SECTOR_BYTES = 512

_ZEROS = re.compile(rb"\0+")

Record = dict[str, Any]


class Journal:
    """One folder's journal. Not thread-safe: who commits holds a lock.

    Attributes:
        path: the file.
        marker: what stays if the file is lost.

    After a failed write or fsync the file is never appended to again, for nobody can know what
    of it is on the device: the next record goes into a new file, with all that is alive.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        """Start with whatever file there is, without looking at it; see :meth:`read`."""
        self.path = folder / JOURNAL_NAME
        self.marker = Marker(folder, files)
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
            nbytes = self.path.stat().st_size
        if nbytes > _MOST_BYTES:
            raise DamagedFileError(
                f"{self.path} has {nbytes} bytes, more than any journal of ours; restore the file "
                "from a copy, or remove the folder and begin anew"
            )
        data = self._files.read(self.path)
        records: list[Record] = []
        start = 0
        while start < len(data):
            frame = data[start : start + _FRAME_BYTES]
            stop = start + _FRAME_BYTES + _length(frame)
            # One that lacks nothing but its last byte says of itself that it is whole.
            is_whole = data[stop : stop + 1] == b"\n" or not data[stop:].strip(b"\0")
            if not (is_whole and _checksum(data[start + 17 : stop]) + b" " == frame[:17]):
                if _is_torn(data, start, stop):
                    break
                raise DamagedFileError(
                    f"{self._at(start, records)} is damaged: its checksum is wrong, and it was not "
                    "cut off by a crash; restore the file from a copy, or remove the folder and "
                    "begin anew"
                )
            records.append(self._parsed(data[start + _FRAME_BYTES : stop], start, records))
            start = stop + 1
        self._nbytes, self._count = start, len(records)
        # What follows is torn: never write after it.
        is_sound = start == len(data) and data.endswith(b"\n")
        self._rewrite_at_bytes = 2 * len(data) + _LEAST_DEAD_BYTES if is_sound else 0
        return records

    def _at(self, start: int, before: list[Record]) -> str:
        return f"{self.path}: record {len(before) + 1} at offset {start}"

    def _parsed(self, text: bytes, start: int, before: list[Record]) -> Record:
        where = self._at(start, before)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(f"{where} is not JSON ({error})") from error
        if not isinstance(record, dict) or record.get("record") != len(before) + 1:
            raise DamagedFileError(
                f"{where} is not number {len(before) + 1}; records are missing before it"
            )
        return record

    def make_durable(self) -> None:
        """Have on the device what :meth:`read` gave; before files go that older records need.

        A killed process may have written a record that no fsync followed.

        Raises:
            StorageError: it is not, or perhaps not.
        """
        if not self._count:
            return
        with self._files.reading(self.path) as fd:
            self._files.sync(fd, self.path)
        self._files.sync_folder(self.path.parent)

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
        with self._files.writing(self.path) as fd:
            try:
                self._files.write(fd, memoryview(line), self._nbytes, self.path)
                self._files.sync(fd, self.path)
            except BaseException:
                with suppress(StorageError):  # else a reader may take it for committed
                    self._files.set_size(fd, self._nbytes, self.path)
                raise
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
        try:
            with self._files.writing(new, new=True) as fd:
                self._files.write(fd, memoryview(line), 0, new)
                self._files.sync(fd, new)
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


def _is_torn(data: bytes, start: int, stop: int) -> bool:
    """Whether a crash left a record unfinished; then it and all after it was never committed.

    Args:
        data: the whole file.
        start: where the record begins.
        stop: where its last byte would be, by its own account.
    """
    rest = data[start:]
    if _has_record(rest):
        return False  # one is only ever written after the one before it was durable
    if 0 in rest:  # JSON has no zeros: blocks that never reached the device
        runs = [(start + run.start(), start + run.end()) for run in _ZEROS.finditer(rest)]
        return all(
            end == len(data)
            or (
                (begin in (start, -(-begin // _SECTOR_BYTES) * _SECTOR_BYTES))
                and end % _SECTOR_BYTES == 0
            )
            for begin, end in runs
        )
    return stop >= len(data) and not rest.endswith(b"\n")


def _has_record(rest: bytes) -> bool:
    """Whether a whole record follows a broken one."""
    begin = rest.find(b"\n") + 1
    while 0 < begin < len(rest):
        frame = rest[begin : begin + _FRAME_BYTES]
        stop = begin + _FRAME_BYTES + _length(frame)
        line = rest[begin : stop + 1]
        if line[-1:] == b"\n" and _checksum(line[17:-1]) + b" " == line[:17]:
            return True
        begin = rest.find(b"\n", begin) + 1
    return False
