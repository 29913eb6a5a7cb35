"""A safetensors file at rest, read where it lies."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import xxhash

from diskoffload.errors import DamagedFileError, StorageError
from diskoffload.store.digests import Checking
from diskoffload.store.header import LENGTH_BYTES, Header, StoredSpec, header_length, parse_header
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.system.files import BLOCK_BYTES, Files, Identity
from diskoffload.system.memory import Memory, discard_written, is_resident, populate

_STEP_BYTES = 4 << 20
# Addresses may be had again later; a file system without mmap stays one.
_AGAIN_AFTER_SECONDS = 1.0
_log = logging.getLogger(__name__)
# Folders, and why their files are read: said once.
_told: set[tuple[str, int]] = set()


class Shard:
    """A safetensors file at rest, opened by one store.

    The header is read once. The file is mapped at the first use, once and for good,
    privately: writing to a tensor of it changes neither the file nor another store's view.
    Where the system refuses to map it, it is read.

    A file that was changed while it is open (truncated, extended, written to) is noticed
    whenever a tensor of it is asked for, read, copied or verified, and named; what was
    removed or replaced by name stays whole in the mapping or the open descriptor. Not to be
    noticed are a change between that look and the first touch of a page, or beneath a tensor
    given out before, and a device that fails then: to touch what is missing is SIGBUS, which
    ends the process. Who fears it reads instead: ``Files(may_map=False)``.

    Attributes:
        path: the file, as it was named.
        header: what it holds.
        header_digest: xxh3-64 of the header's bytes, in hexadecimal.
        owner: whatever must live as long as the file is in use.

    Thread-safe. Tensors keep the mapping alive after the shard is gone.
    """

    def __init__(self, path: Path, files: Files) -> None:
        """Open a file and check its header.

        Raises:
            StorageError: it cannot be opened or read.
            DamagedFileError: it is not a valid safetensors file.
        """
        self._open(path, files)
        try:
            self.header = self._read_header()
        except BaseException:
            self._close()  # an error that is kept for a while keeps this object with it
            raise

    @classmethod
    def just_published(cls, writer: ShardWriter, files: Files) -> Shard:
        """Open a file that was published now; what its header says is known, and not read.

        Of thousands of tensors that would cost as much as writing them.

        Raises:
            StorageError: it cannot be opened.
            DamagedFileError: it is not the file that was written.
        """
        made = cls.__new__(cls)
        made._open(writer.path, files)
        made.header, made.header_digest = writer.header, writer.header_digest
        if made._identity[2] != made.header.file_bytes:
            made._close()
            raise DamagedFileError(
                f"{made.path} was changed as soon as it was written: it has {made._identity[2]} "
                f"bytes rather than {made.header.file_bytes}; leave the folder to this process"
            )
        return made

    def _open(self, path: Path, files: Files) -> None:
        self.path = path
        self.owner: object = None
        self._files = files
        self._lock = threading.Lock()
        self._memory: Memory | None = None
        self._map_again_at = 0.0
        self._unchecked: set[str] | None = None
        self._fd: int = -1
        self._fd = files.open_for_reading(path)
        try:
            # Before the first byte is read, so that no change goes unnoticed.
            self._identity = files.identity(self._fd, path)
        except BaseException:
            self._close()
            raise

    def _read_header(self) -> Header:
        nbytes = self._files.size_bytes(self._fd, self.path)
        prefix = bytearray(min(LENGTH_BYTES, nbytes))
        self._files.read_into(self._fd, memoryview(prefix), 0, self.path)
        raw = bytearray(header_length(bytes(prefix), nbytes, str(self.path)))
        self._files.read_into(self._fd, memoryview(raw), LENGTH_BYTES, self.path)
        self.header_digest = xxhash.xxh3_64_hexdigest(raw)
        return parse_header(bytes(raw), nbytes, str(self.path))

    def twin(self) -> Shard:
        """Open the same file once more, with a mapping of its own.

        Edits made through one are not seen through the other. The file lives as long as
        either. Raises :class:`StorageError` where no descriptor is to be had.
        """
        made = Shard.__new__(Shard)
        made.path, made.header, made._identity = self.path, self.header, self._identity
        made.header_digest = self.header_digest
        made.owner = self
        made._files = self._files
        made._lock = threading.Lock()
        made._memory = None
        made._map_again_at = 0.0
        made._unchecked = None if self._unchecked is None else set(self.header.specs)
        made._fd = -1
        if self._fd >= 0:
            made._fd = self._files.duplicate(self._fd, self.path)
        return made

    @property
    def first(self) -> Shard:
        """The shard that this one is a twin of, or a twin's twin; else itself."""
        owner = self.owner
        return owner.first if isinstance(owner, Shard) else self

    def rest(self, *, keep: bool = False) -> None:
        """Map the file and close the descriptor; later reads open it by its name.

        A model's thousands of shards would need more descriptors than a process may have. If
        somebody removes a file, its mapping still has the bytes.

        Args:
            keep: keep the descriptor where the file cannot be mapped, because it may be removed.
        """
        with self._lock:
            if self._map() is not None or not keep:
                self._close()

    def is_gone(self) -> bool:
        """Whether its name leads elsewhere, and only the mapping, with its edits, has the bytes."""
        if self._fd >= 0 or self._memory is None:
            return False
        try:
            found = self._files.identity_at(self.path)
        except StorageError:
            return False  # it cannot be told now; who reads it is told why
        return found is None or found[:2] != self._identity[:2]

    def is_in_place(self) -> bool:
        """Whether its name leads to the file that was opened, unchanged."""
        return self._files.identity_at(self.path) == self._identity

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self._fd >= 0:
            yield self._fd
            return
        with self._files.reading(self.path) as fd:
            self._check_identity(fd)
            yield fd

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
        self._check_same(self._files.identity(fd, self.path))

    def _check_same(self, now: Identity) -> None:
        if now != self._identity:
            raise DamagedFileError(
                f"{self.path} was changed while it was open (size {self._identity[2]} -> "
                f"{now[2]} bytes): open it again, and do not write to a checkpoint in use"
            )

    @property
    def memory(self) -> Memory | None:
        """The file's private mapping, made at the first use; ``None`` where it is refused.

        Raises:
            DamagedFileError: the file was changed, so that touching it might be fatal.
            StorageError: it cannot be looked at.
        """
        with self._lock:
            return self._map()

    def _map(self) -> Memory | None:
        if self._memory is not None:
            self._check_mapped()
        elif time.monotonic() >= self._map_again_at:
            with self._opened() as fd:
                self._check_identity(fd)  # one that shrank is SIGBUS at the first touch
                try:
                    self._memory = self._files.map(fd, self.header.file_bytes, self.path)
                except StorageError as error:
                    self._tell_of_refusal(error)
        return self._memory

    def _check_mapped(self) -> None:
        """Notice a change of the mapped file, though no descriptor or permission may be left."""
        try:
            if self._fd >= 0:
                now: Identity | None = self._files.identity(self._fd, self.path)
            else:
                now = self._files.identity_at(self.path)
        except StorageError:
            return  # what is mapped is as good as it was
        if now is not None and now[:2] == self._identity[:2]:  # else another has its name
            self._check_same(now)

    def _tell_of_refusal(self, error: StorageError) -> None:
        may_pass = error.errno in (errno.ENOMEM, errno.EAGAIN)
        self._map_again_at = time.monotonic() + _AGAIN_AFTER_SECONDS if may_pass else float("inf")
        key = (str(self.path.parent), error.errno or 0)
        if key not in _told:
            _told.add(key)
            _log.warning(
                "files in %s are read into memory rather than mapped: %s", key[0], error.strerror
            )

    def mapped(self, spec: StoredSpec) -> torch.Tensor | None:
        """Give a tensor that aliases the mapping; it costs no memory until it is touched.

        ``None`` where the system refuses to map the file: then it is to be read. Raises as
        :attr:`memory` does.
        """
        return self.mapped_as(spec, spec.dtype, spec.shape)

    def mapped_as(
        self, spec: StoredSpec, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor | None:
        """Give a tensor of another type and shape that aliases the bytes of one."""
        if spec.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        memory = self.memory
        return None if memory is None else memory.tensor(dtype, shape, spec.offset)

    def read_into(self, spec: StoredSpec, target: memoryview, start: int = 0) -> None:
        """Read bytes of a tensor, from its byte ``start`` on, into ``target``.

        Raises:
            DamagedFileError: the file was changed since it was opened.
            StorageError: it cannot be read.
        """
        try:
            self.read_at(spec.offset + start, target)
        except StorageError:
            # Removed or replaced: in a child, by the parent that owns it.
            if not self.is_gone():
                raise
            target[:] = self._last_copy().view(spec.offset + start, len(target))

    def _last_copy(self) -> Memory:
        assert self._memory is not None  # it is gone
        return self._memory

    def forget_edits(self, address: int, nbytes: int) -> None:
        """Have whole pages of the mapping that were written to, and are of no more use, be free.

        They read as the file again. Where the system cannot forget them they are mapped anew;
        if the file is gone by then they stay what they are, as long as the mapping does.
        """
        memory = self._memory
        if memory is None or discard_written(address, nbytes):
            return
        with suppress(StorageError, DamagedFileError), self._opened() as fd:
            self._check_identity(fd)
            self._files.map_again(memory, fd, address, nbytes, self.path)

    def has_bytes(self, spec: StoredSpec, value: memoryview, start: int = 0) -> bool:
        """Tell whether the file has just these bytes of a tensor, reading a part at a time.

        They are the tensor's from its byte ``start`` on.

        Unlike :meth:`read_into` it never asks the mapping, which may be what is in question.

        Raises:
            DamagedFileError: the file was changed or replaced since it was opened.
            StorageError: it cannot be read.
        """
        buffer = torch.empty(min(_STEP_BYTES, len(value)), dtype=torch.uint8)
        for begin in range(0, len(value), _STEP_BYTES):
            part = torch.frombuffer(value[begin : begin + _STEP_BYTES], dtype=torch.uint8)
            self.read_at(spec.offset + start + begin, buffer[: len(part)].numpy().data)
            if not torch.equal(buffer[: len(part)], part):
                return False
        return True

    def check_first_reads(self, wanted: bool) -> None:
        """Have every tensor's bytes compared with its digest before it is mapped first, or not."""
        self._unchecked = set(self.header.specs) if wanted else None

    def check_first_read(self, spec: StoredSpec, digest: str | None) -> None:
        """Compare a tensor's bytes with its digest, if that is wanted and was not done yet.

        Raises:
            DamagedFileError: they are not those that were written.
        """
        if self._unchecked is None or spec.name not in self._unchecked:
            return
        self.verify(spec, digest)
        self._unchecked.discard(spec.name)

    def verify(self, spec: StoredSpec, digest: str | None) -> None:
        """Compare a tensor's bytes in the file with their digest; none is as good as right.

        Raises:
            DamagedFileError: they are not those that were written.
            StorageError: they cannot be read.
        """
        check = Checking(str(self.path), spec.name, spec.offset, digest)
        buffer = memoryview(bytearray(min(_STEP_BYTES, spec.nbytes)))
        for start in range(0, spec.nbytes if digest is not None else 0, _STEP_BYTES):
            step = buffer[: min(_STEP_BYTES, spec.nbytes - start)]
            self.read_into(spec, step, start)
            check.add(step)
        check.finish()

    def read_at(self, offset: int, target: memoryview) -> None:
        """Read bytes of the file, whatever they are part of; raises as :meth:`read_into`."""
        with self._opened() as fd:
            try:
                self._files.read_into(fd, target, offset, self.path)
            finally:
                self._check_identity(fd)  # afterwards: what came is what was opened

    def read_past_cache(self, spec: StoredSpec, start: int, stop: int, buffer: Memory) -> None:
        """Read a part of a tensor into a buffer, leaving nothing of it in the page cache.

        The tensor's byte ``n`` comes to the buffer's byte ``spec.offset % BLOCK_BYTES + n``.
        Where the file system has no direct reads, the part is read through the page cache and
        dropped from it.

        Args:
            spec: the tensor.
            start: first byte of the part; the parts of a tensor begin where blocks of the file
                do, but for the first.
            stop: the byte after its last.
            buffer: at least :func:`buffer_bytes` long; other parts of it are left alone.

        Raises:
            DamagedFileError: the file was changed since it was opened.
            StorageError: it cannot be read.
        """
        begin = (spec.offset + start) // BLOCK_BYTES * BLOCK_BYTES
        place = begin - spec.offset // BLOCK_BYTES * BLOCK_BYTES
        needed_bytes = spec.offset + stop - begin
        if self.is_gone():  # removed or replaced: in a child, by the parent that owns it
            buffer.view(place, needed_bytes)[:] = self._last_copy().view(begin, needed_bytes)
            return
        fd = self._files.open_past_cache(self.path, self._fd)
        if fd is None:
            self._tell_of_no_direct_reads()
            with self._opened() as usual:
                self._files.read_into(usual, buffer.view(place, needed_bytes), begin, self.path)
                self._check_identity(usual)
                self._files.drop_from_cache(usual, begin, needed_bytes)
            return
        try:
            target = buffer.view(place, -(-needed_bytes // BLOCK_BYTES) * BLOCK_BYTES)
            self._files.read_blocks(fd, target, begin, needed_bytes, self.path)
            self._check_identity(fd)
        finally:
            self._files.close(fd)

    def is_cached(self, spec: StoredSpec) -> bool:
        """Whether a tensor's bytes are in the page cache, by all signs: of some pages it is asked.

        ``False`` where that is not told. Raises as :attr:`memory` does.
        """
        memory = self.memory
        if memory is None or not spec.nbytes:
            return False
        with self._opened() as fd:
            if not self._files.tells_what_is_cached(fd, self.path):
                return False
        last = spec.offset + spec.nbytes - 1
        places = (spec.offset, (spec.offset + last) // 2, last)
        return all(is_resident(memory.address + place) for place in places)

    def _tell_of_no_direct_reads(self) -> None:
        key = (str(self.path.parent), -1)
        if key not in _told:
            _told.add(key)
            _log.warning(
                "files in %s cannot be read past the page cache: they are read through it, and "
                "dropped from it",
                key[0],
            )

    @property
    def mtime_ns(self) -> int:
        """When the file was changed last, as of when it was opened."""
        return self._identity[3]

    def prefetch(self, spec: StoredSpec, start: int = 0, stop: int | None = None) -> None:
        """Ask the kernel to read a tensor, or some bytes of it, ahead of its use.

        What was read already is not read again. Raises as :meth:`read_into` does.
        """
        nbytes = (spec.nbytes if stop is None else stop) - start
        with self._opened() as fd:
            self._files.fetch_into_cache(fd, spec.offset + start, nbytes)

    def populate(self, spec: StoredSpec, start: int, stop: int) -> None:
        """Read some bytes of a tensor into the page cache, and lay them beneath the mapping.

        Where that cannot be had, the kernel is asked to read them. Raises as :attr:`memory` does.
        """
        memory = self.memory
        if memory is None or not populate(memory, spec.offset + start, stop - start):
            self.prefetch(spec, start, stop)

    def drop_behind(self, start: int, stop: int) -> None:
        """Tell the kernel that bytes of the file are of no more use; a hint, no promise.

        Pages, huge ones too, that are not wholly among them stay.
        """
        with self._opened() as fd:
            self._files.drop_from_cache(fd, start, stop - start)

    def drop_tensor_behind(self, spec: StoredSpec) -> None:
        """Tell the kernel that a tensor's pages are of no more use, mapped ones too.

        Nobody may use the mapped tensor: it reads as the file again, at the price of reading it.
        """
        if self._memory is not None:
            discard_written(self._memory.address + spec.offset, spec.nbytes)
        self.drop_behind(spec.offset, spec.offset + spec.nbytes)

    def copy_to(
        self, spec: StoredSpec, writer: ShardWriter, name: str, digest: str | None = None
    ) -> None:
        """Copy a tensor's bytes into a file being written: those of the file, never a mapping's.

        Raises:
            DamagedFileError: they are not those of the digest, or the file was changed.
            StorageError: they cannot be read or written.
        """
        if self.is_gone():
            writer.write(name, self._last_copy().view(spec.offset, spec.nbytes))
        else:
            with self._opened() as fd:
                self._check_identity(fd)

                def read(part: memoryview, start: int) -> None:
                    self._files.read_into(fd, part, spec.offset + start, self.path)

                writer.fill(name, read)
                self._check_identity(fd)
        check = Checking(str(self.path), spec.name, spec.offset, digest)
        check.compare(writer.digests[name])


def buffer_bytes(spec: StoredSpec) -> int:
    """Tell how large a buffer must be to read a tensor past the page cache."""
    begin = spec.offset // BLOCK_BYTES * BLOCK_BYTES
    return -(-(spec.offset + spec.nbytes - begin) // BLOCK_BYTES) * BLOCK_BYTES
