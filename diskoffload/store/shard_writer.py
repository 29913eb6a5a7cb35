"""A safetensors file being written; it has its name only when it is complete."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.header import FILLER_PREFIX, Header, Planned, build_header
from diskoffload.system.files import Files

_WRITE_STEP_BYTES = 8 << 20
_WRITE_BEHIND_BYTES = 64 << 20

Left = Literal["published", "begun", "nothing"]
"""What an earlier writer left of a file."""


def left_of(
    path: Path, tensors: Iterable[Planned], files: Files, metadata: Mapping[str, str] | None = None
) -> Left:
    """Tell what an earlier writer, made with the same arguments, left of its file.

    Header and length are compared; a file of others, or a truncated one, is ``"nothing"``.
    """
    raw, header = build_header(tensors, metadata)
    if files.begins_with(path, raw, header.file_bytes):
        return "published"
    partial = path.with_name(path.name + ".partial")
    return "begun" if files.begins_with(partial, raw, header.file_bytes) else "nothing"


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand.

    The header goes first, then the tensors in any order. The file appears under its name
    only when :meth:`publish` finds it complete; until then it has the name
    with ``.partial`` after it. Leaving it as a context manager without publishing removes
    what was written. Not thread-safe.

    Attributes:
        path: the final name.
        header: where each tensor goes.
        written_bytes: bytes written so far.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[Planned],
        files: Files,
        metadata: Mapping[str, str] | None = None,
        *,
        fill: bool = False,
    ) -> None:
        """Create the file and write its header.

        Raises:
            UnsupportedTensorError: a dtype that safetensors does not know.
            StorageError: the file cannot be created or written.
        """
        planned = list(tensors)
        raw, header = build_header(planned, metadata, fill=fill)
        partial = path.with_name(path.name + ".partial")
        self._set_up(path, header, files, files.create(partial))
        self._planned, self._fill = planned, fill
        try:
            self._put(memoryview(raw), 0)
            files.set_size(self._fd, self.header.file_bytes, self._partial)
        except BaseException:
            self.abandon()
            raise

    @classmethod
    def resumed(
        cls,
        path: Path,
        tensors: Iterable[Planned],
        files: Files,
        metadata: Mapping[str, str] | None = None,
        *,
        finished: set[str],
    ) -> ShardWriter:
        """Go on with a file that :meth:`suspend` left, or begin it.

        Args:
            path: as for the constructor.
            tensors: as for the constructor; the same as before.
            files: as for the constructor.
            metadata: as for the constructor; the same as before.
            finished: names of tensors whose bytes are in the file already.
        """
        planned = list(tensors)
        raw, header = build_header(planned, metadata)
        partial = path.with_name(path.name + ".partial")
        names = finished & header.specs.keys()
        if not names or not files.begins_with(partial, raw, header.file_bytes):
            if names:
                raise DamagedFileError(
                    f"{partial} is not the file that was begun, and {len(names)} tensors of it "
                    "are noted as written; remove its folder and begin anew"
                )
            files.remove(partial)
            return cls(path, planned, files, metadata)
        made = cls.__new__(cls)
        made._set_up(path, header, files, files.open_for_writing(partial))
        made._missing -= names
        return made

    def _set_up(self, path: Path, header: Header, files: Files, fd: int) -> None:
        self.path = path
        self.header = header
        self.written_bytes = 0
        self._files = files
        self._partial = path.with_name(path.name + ".partial")
        self._missing = {
            name
            for name, spec in header.specs.items()
            if spec.nbytes and not name.startswith(FILLER_PREFIX)
        }
        self._since_flush_bytes = 0
        self._sync_failed = False
        self._name_is_durable = False
        self._fd = fd

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abandon()

    def _put(self, data: memoryview, offset: int) -> None:
        self._files.write(self._fd, data, offset, self._partial)
        self._account(len(data))

    def _account(self, nbytes: int) -> None:
        self.written_bytes += nbytes
        self._since_flush_bytes += nbytes
        if self._since_flush_bytes >= _WRITE_BEHIND_BYTES:
            # Else a container's memory fills with dirty pages and the writer is throttled.
            self._sync_data()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._since_flush_bytes = 0

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Write other metadata in the place of those that were given, of the same length."""
        raw, header = build_header(self._planned, metadata, fill=self._fill)
        assert header.data_offset == self.header.data_offset
        self._put(memoryview(raw), 0)

    def write_part(self, name: str, data: memoryview, start: int = 0) -> None:
        """Write some bytes of a tensor, from its byte ``start`` on."""
        offset = self.header.specs[name].offset + start
        for begin in range(0, len(data), _WRITE_STEP_BYTES):
            self._put(data[begin : begin + _WRITE_STEP_BYTES], offset + begin)

    def write(self, name: str, data: memoryview) -> None:
        """Write all of a tensor's bytes."""
        spec = self.header.specs[name]
        if len(data) != spec.nbytes:
            raise StorageError(
                f"cannot write {name!r} to {self.path}: {len(data)} bytes were given "
                f"and {spec.nbytes} were planned"
            )
        self.write_part(name, data)
        self._missing.discard(name)

    def finish_parts(self, name: str) -> None:
        """Say that a tensor written by :meth:`write_part` is complete."""
        self._missing.discard(name)

    def copy(self, name: str, source_fd: int, source_offset: int) -> None:
        """Copy all of a tensor's bytes from another file, inside the kernel."""
        spec = self.header.specs[name]
        done = 0
        while done < spec.nbytes:
            step = min(_WRITE_BEHIND_BYTES, spec.nbytes - done)
            self._files.copy_range(
                source_fd, source_offset + done, self._fd, spec.offset + done, step, self._partial
            )
            self._account(step)
            done += step
        self._missing.discard(name)

    def publish(self, *, durable: bool = True) -> Path:
        """Give the complete file its name; nothing may follow.

        Args:
            durable: wait until file and name are on the device, as a result must; scratch
                need not.

        Raises:
            StorageError: a planned tensor was never written, or the system refuses. Unless it
                has its name by then, the file is still there to :meth:`abandon` or to leave.
        """
        if self._missing:
            raise StorageError(
                f"cannot publish {self.path}: {len(self._missing)} of its tensors were not "
                f"written, {sorted(self._missing)[0]!r} among them"
            )
        if durable:
            self._sync_data()
        self._files.rename(self._partial, self.path)
        fd, self._fd = self._fd, -1
        try:
            self._files.close(fd)
        except BaseException:
            self._files.remove(self.path)
            raise
        if durable:
            self._files.sync_folder(self.path.parent)
        return self.path

    def sync(self) -> None:
        """Make what was written so far durable, and that the file is there.

        Raises:
            StorageError: it is not, or perhaps not; then neither is it at any later call, since
                the system may report a lost write only once. What an earlier call made durable
                stays so.
        """
        self._sync_data()
        if not self._name_is_durable:
            self._files.sync_folder(self.path.parent)
            self._name_is_durable = True

    def _sync_data(self) -> None:
        if self._sync_failed or self._fd < 0:
            raise StorageError(
                errno.EIO, "could not sync the file: that failed before", str(self._partial)
            )
        self._sync_failed = True
        self._files.sync(self._fd, self._partial)
        self._sync_failed = False

    def leave(self) -> None:
        """Close the file and leave it as it is, for :meth:`resumed`."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._files.close(fd)

    def suspend(self) -> None:
        """Make what was written so far durable and leave it, for :meth:`resumed`."""
        self.sync()
        self.leave()

    def abandon(self) -> None:
        """Remove what was written, unless it was published."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._files.close(fd)
            self._files.remove(self._partial)
