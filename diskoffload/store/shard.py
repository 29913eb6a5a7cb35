"""One safetensors file: read where it lies, or written from front to back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.header import (
    FILLER_PREFIX,
    LENGTH_BYTES,
    Header,
    Planned,
    StoredSpec,
    build_header,
    header_length,
    parse_header,
)
from diskoffload.system.files import Files
from diskoffload.system.memory import Memory, map_file

_WRITE_STEP_BYTES = 8 << 20
_WRITE_BEHIND_BYTES = 64 << 20


class Shard:
    """A safetensors file at rest, opened by one store.

    The header is read once. The file is mapped at the first use, once and for good,
    privately: writing to a tensor of it changes neither the file nor another store's view.

    Attributes:
        path: the file, as it was named.
        header: what it holds.
        owner: whatever must live as long as the file is in use.

    Thread-safe. Tensors keep the mapping alive after the shard is gone.
    """

    def __init__(self, path: Path, files: Files) -> None:
        """Open a file and check its header.

        Raises:
            StorageError: it cannot be opened or read.
            DamagedFileError: it is not a valid safetensors file.
        """
        self.path = path
        self.owner: object = None
        self._files = files
        self._lock = threading.Lock()
        self._memory: Memory | None = None
        self._fd: int = -1
        self._fd = files.open_for_reading(path)
        try:
            # Before the first byte is read, so that no change goes unnoticed.
            status = os.fstat(self._fd)
            self._identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            self.header = self._read_header()
        except BaseException:
            self._close()  # an error that is kept for a while keeps this object with it
            raise

    def _read_header(self) -> Header:
        nbytes = self._files.size_bytes(self._fd, self.path)
        prefix = bytearray(min(LENGTH_BYTES, nbytes))
        self._files.read_into(self._fd, memoryview(prefix), 0, self.path)
        raw = bytearray(header_length(bytes(prefix), nbytes, str(self.path)))
        self._files.read_into(self._fd, memoryview(raw), LENGTH_BYTES, self.path)
        return parse_header(bytes(raw), nbytes, str(self.path))

    def twin(self) -> Shard:
        """Open the same file once more, with a mapping of its own.

        Edits made through one are not seen through the other. The file lives as long as
        either. Raises :class:`StorageError` where no descriptor is to be had.
        """
        made = Shard.__new__(Shard)
        made.path, made.header, made._identity = self.path, self.header, self._identity
        made.owner = self
        made._files = self._files
        made._lock = threading.Lock()
        made._memory = None
        made._fd = -1
        if self._fd >= 0:
            made._fd = self._files.duplicate(self._fd, self.path)
        return made

    def rest(self) -> None:
        """Map the file and close the descriptor; later reads open it by its name.

        For files that nobody should rename: a model's thousands of shards would need more
        descriptors than a process may have. If somebody removes one all the same, its
        mapping still has the bytes.
        """
        with self._lock:
            self._map()
            self._close()

    def _is_gone(self) -> bool:
        return self._fd < 0 and self._memory is not None and not self.path.exists()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self._fd >= 0:
            yield self._fd
            return
        fd = self._files.open_for_reading(self.path)
        try:
            self._check_identity(fd)
            yield fd
        finally:
            self._files.close(fd)

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __repr__(self) -> str:
        return f"Shard({str(self.path)!r}, {len(self.header.specs)} tensors)"

    def check_unchanged(self) -> None:
        """Raise :class:`DamagedFileError` if the file was changed since it was opened."""
        with self._opened() as fd:
            self._check_identity(fd)

    def _check_identity(self, fd: int) -> None:
        status = os.fstat(fd)
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if now != self._identity:
            raise DamagedFileError(
                f"{self.path} was changed while it was open (size {self._identity[2]} -> "
                f"{now[2]} bytes): open it again, and do not write to a checkpoint in use"
            )

    @property
    def memory(self) -> Memory:
        """The file's private mapping, made at the first use."""
        with self._lock:
            return self._map()

    def _map(self) -> Memory:
        if self._memory is None:
            with self._opened() as fd:
                self._check_identity(fd)  # one that shrank is SIGBUS at the first touch
                self._memory = map_file(fd, self.header.file_bytes, str(self.path))
        return self._memory

    def mapped(self, spec: StoredSpec) -> torch.Tensor:
        """Give a tensor that aliases the mapping; it costs no memory until it is touched."""
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return self.memory.tensor(spec.dtype, spec.shape, spec.offset)

    def read_into(self, spec: StoredSpec, target: memoryview, start: int = 0) -> None:
        """Read bytes of a tensor, from its byte ``start`` on, into ``target``."""
        if self._is_gone():
            target[:] = self.memory.view(spec.offset + start, len(target))
            return
        with self._opened() as fd:
            self._files.read_into(fd, target, spec.offset + start, self.path)

    def prefetch(self, spec: StoredSpec) -> None:
        """Ask the kernel to read a tensor ahead of its use."""
        if hasattr(os, "posix_fadvise"):
            with self._opened() as fd:
                os.posix_fadvise(fd, spec.offset, spec.nbytes, os.POSIX_FADV_WILLNEED)

    def drop_behind(self, spec: StoredSpec) -> None:
        """Tell the kernel that a tensor's pages are of no more use; a hint, no promise."""
        if hasattr(os, "posix_fadvise"):
            with self._opened() as fd:
                os.posix_fadvise(fd, spec.offset, spec.nbytes, os.POSIX_FADV_DONTNEED)

    def copy_to(self, spec: StoredSpec, writer: ShardWriter, name: str) -> None:
        """Copy a tensor's bytes into a file being written, inside the kernel."""
        if self._is_gone():
            writer.write(name, self.memory.view(spec.offset, spec.nbytes))
            return
        with self._opened() as fd:
            self._check_identity(fd)
            writer.copy(name, fd, spec.offset)


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
        raw, header = build_header(tensors, metadata, fill=fill)
        partial = path.with_name(path.name + ".partial")
        self._set_up(path, header, files, files.create(partial))
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
            self._files.sync(self._fd, self._partial)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._since_flush_bytes = 0

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
            StorageError: a planned tensor was never written, or the system refuses.
        """
        if self._missing:
            raise StorageError(
                f"cannot publish {self.path}: {len(self._missing)} of its tensors were not "
                f"written, {sorted(self._missing)[0]!r} among them"
            )
        if durable:
            self._files.sync(self._fd, self._partial)
        fd, self._fd = self._fd, -1
        try:
            self._files.close(fd)
            self._files.rename(self._partial, self.path)
        except BaseException:
            self._files.remove(self._partial)
            raise
        if durable:
            self._files.sync_folder(self.path.parent)
        return self.path

    def suspend(self) -> None:
        """Make what was written so far durable and leave it, for :meth:`resumed`."""
        self._files.sync(self._fd, self._partial)
        fd, self._fd = self._fd, -1
        self._files.close(fd)

    def abandon(self) -> None:
        """Remove what was written, unless it was published."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._files.close(fd)
            self._files.remove(self._partial)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View a contiguous CPU tensor's bytes; the view keeps its memory alive."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data.cast("B")
