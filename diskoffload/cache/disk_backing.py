"""Where the value of an entry is that waits on disk."""

from __future__ import annotations

from typing import Any

import torch

from diskoffload.residency.held import Backing
from diskoffload.store.compression import Compression
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.folder import Folder
from diskoffload.store.header import ALIGNMENT_BYTES
from diskoffload.store.pieces import Streamable
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, Stored, StridedTensor
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.memory import PAGE_BYTES, is_laid_plainly, tensor_bytes, written_pages


class DiskBacking:
    """A value in a file: of our folder, or of a checkpoint that is used where it lies."""

    memory = None
    is_counted = False
    root = None

    def __init__(
        self,
        folder: Folder,
        compression: Compression,
        stored: Stored | None,
        layout: tuple[torch.dtype, tuple[int, ...]] | None = None,
        *,
        align: bool = False,
    ) -> None:
        """Describe where a value is.

        Args:
            folder: where a newer value goes.
            compression: how that is written.
            stored: the value, or ``None`` while it is only in its object.
            layout: dtype and shape, needed while nothing is stored.
            align: copy a value that lies at no multiple of 64 bytes rather than map it.
        """
        self.folder = folder
        self.compression = compression
        self.stored = stored
        self.align = align
        if layout is None:
            assert stored is not None  # only a value not written yet has no place
            layout = (stored.dtype, stored.shape)
        self.layout = layout

    @property
    def plain_stored(self) -> ShardTensor | None:
        """The tensor in a file whose bytes are the value's, if there is one."""
        return self.stored if isinstance(self.stored, ShardTensor) else None

    @property
    def streamable(self) -> Streamable | None:
        """The tensor in a file that can be read past the page cache, if there is one."""
        if isinstance(self.stored, EncodedTensor):
            return self.stored if self.stored.has_checked_chunks else None
        return self.plain_stored

    def view_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Do nothing: there is no root to view."""
        return whole

    def beneath(self, device: torch.device) -> torch.Tensor | None:
        """Alias the mapped file, for the CPU and where its bytes are the value."""
        if device.type != "cpu" or self.stored is None:
            return None
        mapped = self.stored.mapped()
        if self.align and mapped is not None and mapped.data_ptr() % ALIGNMENT_BYTES:
            return None
        return mapped

    def load(self, device: torch.device) -> torch.Tensor:
        """Read, decode or assemble the value, and copy it to the device."""
        assert self.stored is not None  # what is not written yet is still in its object
        return self.stored.load().to(device)

    def check_open(self, name: str) -> None:
        """Raise :class:`ClosedError` if our folder takes no more."""
        self.folder.check_open(name)

    def rewrite(self, name: str, value: torch.Tensor) -> Backing | Ticket:
        """Queue a newer value for writing to our folder, whatever it was read from."""
        return self.folder.put(name, value, self.compression)

    def succeed(self, ticket: Ticket) -> Backing:
        """Refer to what the ticket has stored."""
        return DiskBacking(self.folder, self.compression, ticket.stored, align=self.align)

    def apart(self, layout: tuple[torch.dtype, tuple[int, ...]]) -> Backing:
        """Have the same place for newer values, and none stored."""
        return DiskBacking(self.folder, self.compression, None, layout, align=self.align)

    def rebased(self, folder: Folder, compression: Compression) -> DiskBacking:
        """Refer to the same value, with another place for newer ones."""
        return DiskBacking(folder, compression, self.stored, self.layout, align=self.align)

    def twin(self, memo: dict[int, Any], *, gaps: bool) -> Backing | None:
        """Refer to the same file through a mapping of its own."""
        if self.stored is None:
            return None

        def twin_of(shard: Shard) -> Shard:
            made: Shard = memo.setdefault(id(shard), None) or shard.twin()
            memo[id(shard)] = made
            return made

        stored = self.stored.over(twin_of)
        if not gaps and isinstance(stored, StridedTensor):
            stored = stored.without_gaps()
        return DiskBacking(self.folder, self.compression, stored, align=self.align)

    def forget_edits(self, address: int, nbytes: int) -> None:
        """Drop the kernel's private copies of the pages that were written, but for the edges."""
        if self.stored is None:
            return
        mapped = self.beneath(torch.device("cpu"))
        if mapped is not None and mapped.data_ptr() == address and mapped.nbytes == nbytes:
            for shard in self.stored.shards:
                shard.forget_edits(address, nbytes)  # mapped, so it is one

    def holds(self, value: torch.Tensor) -> bool:
        """Compare a value with what is stored; of the file no more is read than tells."""
        assert self.stored is not None  # it was loaded
        if isinstance(self.stored, ShardTensor) and is_laid_plainly(value):
            return self._lies_on_file(value)
        return digest_of(self.load(value.device)) == digest_of(value)

    def was_edited(self, value: torch.Tensor) -> bool:
        """Find edits of a mapped value: the kernel says which pages were written.

        A page at either edge may hold a neighbour's edit, so its bytes are compared.
        Where the kernel does not say, all bytes are.
        """
        assert self.stored is not None  # it was mapped
        address, nbytes = value.data_ptr(), value.numel() * value.dtype.itemsize
        runs = written_pages(address, nbytes)
        if runs is None:
            return not self._lies_on_file(value)
        if any(shard.is_gone() for shard in self.stored.shards):
            return any(True for _ in runs)  # there is nothing left to compare with
        for start, stop in runs:
            first, last = max(start, address), min(stop, address + nbytes)
            whole = start >= address and stop <= address + nbytes
            if whole or last - first > 2 * PAGE_BYTES:
                return True
            if not self._lies_on_file(value, first - address, last - address):
                return True
        return False

    def _lies_on_file(self, value: torch.Tensor, start: int = 0, stop: int | None = None) -> bool:
        """Compare a value's bytes from ``start`` to ``stop`` with the file's, all by default."""
        assert isinstance(self.stored, (ShardTensor, EncodedTensor))  # no other is mapped
        shard, spec, digest = self.stored.shard, self.stored.spec, self.stored.digest
        if shard.is_gone():  # of what has no digest it cannot be told, so it is written anew
            return digest is not None and digest_of(value).hex() == digest
        return shard.has_bytes(spec, tensor_bytes(value)[start:stop], start)
