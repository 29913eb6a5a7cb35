"""Tensors that wait on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.base import Device, OffloadCache
from diskoffload.errors import InvalidInputError
from diskoffload.residency.held import Backing, Held, State
from diskoffload.residency.resident import Residency
from diskoffload.store.codec import codec_named
from diskoffload.store.folder import Folder, open_folders
from diskoffload.store.header import ALIGNMENT_BYTES
from diskoffload.store.shard import Shard
from diskoffload.store.stored import Stored
from diskoffload.store.writer import Ticket
from diskoffload.system.memory import (
    PAGE_BYTES,
    discard_written,
    empty,
    tensor_bytes,
    written_pages,
)


class DiskBacking:
    """A value in a file: of our folder, or of a checkpoint that is used where it lies."""

    memory = None
    root = None

    def __init__(
        self,
        folder: Folder,
        compression: str | None,
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

    def rebased(self, folder: Folder, compression: str | None) -> DiskBacking:
        """Refer to the same value, with another place for newer ones."""
        return DiskBacking(folder, compression, self.stored, self.layout, align=self.align)

    def twin(self, memo: dict[int, Any]) -> Backing | None:
        """Refer to the same file through a mapping of its own."""
        if self.stored is None:
            return None

        def twin_of(shard: Shard) -> Shard:
            made: Shard = memo.setdefault(id(shard), None) or shard.twin()
            memo[id(shard)] = made
            return made

        stored = self.stored.over(twin_of)
        return DiskBacking(self.folder, self.compression, stored, align=self.align)

    def forget_edits(self, address: int, nbytes: int) -> None:
        """Drop the kernel's private copies of the pages that were written, but for the edges."""
        mapped = self.beneath(torch.device("cpu"))
        if mapped is not None and mapped.data_ptr() == address and mapped.nbytes == nbytes:
            discard_written(address, nbytes)

    def was_edited(self, value: torch.Tensor) -> bool:
        """Find edits of a mapped value: the kernel says which pages were written.

        A page at either edge may hold a neighbour's edit, so its bytes are compared.
        Where the kernel does not say, all bytes are.
        """
        assert self.stored is not None  # it was mapped
        address, nbytes = value.data_ptr(), value.numel() * value.dtype.itemsize
        runs = written_pages(address, nbytes)
        if runs is None:
            return not torch.equal(_bytes(value), _bytes(self.stored.load()))
        original: torch.Tensor | None = None
        if any(shard.is_gone() for shard in self.stored.shards):
            return any(True for _ in runs)  # there is nothing left to compare with
        for start, stop in runs:
            first, last = max(start, address), min(stop, address + nbytes)
            whole = start >= address and stop <= address + nbytes
            if whole or last - first > 2 * PAGE_BYTES:
                return True
            if original is None:
                original = _bytes(self.stored.load())
            part = slice(first - address, last - address)
            if not torch.equal(_bytes(value)[part], original[part]):
                return True
        return False


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(tensor_bytes(tensor), dtype=torch.uint8)


class DiskCache(OffloadCache, kind="disk"):
    """Offloads to safetensors shards in a folder, and reads them through private mappings.

    Uncompressed tensors on the CPU alias the mapping: a read costs nothing but the page
    cache, and memory is the kernel's to take back. Others are loaded when they are read,
    and leave when nothing uses them.

    Attributes:
        offload_dir: the folder that offloaded tensors are written to.
        compression: codec for what is written, or ``None``.
    """

    offload_device = "disk"

    def __init__(
        self,
        onload_device: Device,
        offload_device: Device | None = None,
        offload_dir: Folder | Path | str | None = None,
        *,
        compression: str | None = None,
        name: str = "",
        residency: Residency | None = None,
    ) -> None:
        """Start empty.

        Args:
            onload_device: where reads bring tensors.
            offload_device: ``"disk"`` or ``None``.
            offload_dir: a folder on a disk, made if need be; several caches may name the
                same. ``None`` takes a fresh temporary one that goes with its owner.
            compression: ``None`` or ``"zstd"``: written losslessly compressed.
            name: full name of the module in the model.
            residency: keeps the books of what is in memory.

        Raises:
            InvalidInputError: no such device or codec.
            FolderInUseError: another process owns the folder.
            StorageError: the folder cannot be made or locked.
        """
        super().__init__(onload_device, offload_device, name=name, residency=residency)
        if compression is not None:
            codec_named(compression)
        self.compression = compression
        self.folder = open_folders.at(offload_dir)

    @property
    def offload_dir(self) -> Path:
        """The folder that offloaded tensors are written to."""
        return self.folder.path

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """Give the real tensor for an offloaded one, on the onload device.

        It may alias the file's private mapping; an edit of it never reaches the file.
        """
        if offloaded is None:
            return None
        return self.residency.onload(self._entry(offloaded), self.onload_device)

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Write a tensor out and give the meta tensor that stands for it.

        The value is kept as long as that meta tensor is, or an entry made from it.
        """
        if tensor is None or tensor.is_meta:
            return tensor
        held = self._new("tensor", tensor)
        offloaded = held.offloaded
        offloaded.__dict__["_diskoffload_entry"] = held  # nobody else owns the entry yet
        return offloaded

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """Give an offloaded tensor the value that ``data`` has now; ``None`` does nothing."""
        if data is not None:
            self.residency.update(self._entry(offloaded), data, self.onload_device)

    def sync(self) -> None:
        """Write every change of every entry, in-place edits included, and wait for it.

        Raises:
            StorageError: a write failed; the values are still held, and a later call
                tries again.
        """
        self.residency.sync(self._is_mine)

    def _is_mine(self, held: Held) -> bool:
        backing = held.root.backing
        return isinstance(backing, DiskBacking) and backing.folder is self.folder

    def _like(self) -> DiskCache:
        return DiskCache(
            self.onload_device,
            offload_dir=self.folder,
            compression=self.compression,
            name=self.name,
            residency=self.residency,
        )

    def _back(self, tensor: torch.Tensor) -> tuple[Backing, State, bool]:
        if tensor.device.type == "meta":
            raise InvalidInputError("a meta tensor has no value to offload")
        layout = (tensor.dtype, tuple(tensor.shape))
        return DiskBacking(self.folder, self.compression, None, layout), State.FRESH, True

    def _accepts(self, held: Held) -> bool:
        return isinstance(held.backing, DiskBacking)

    def _rebase(self, held: Held) -> None:
        backing = held.backing
        assert isinstance(backing, DiskBacking)  # it was accepted
        held.backing = backing.rebased(self.folder, self.compression)

    def _move_in(self, held: Held) -> None:
        assert held.tensor is not None  # it was onloaded
        held.backing, state, write = self._back(held.tensor)
        held.state = state
        self.residency.adopt(held, write=write)

    def _free(self, held: Held, onload: bool) -> torch.Tensor:
        place = self.onload_device if onload else torch.device("cpu")
        tensor = self.residency.onload(held, place)
        if onload and held.root.state is State.BENEATH:
            whole = held.root.tensor
            assert whole is not None  # the entry lies on it
            memory = empty(whole.dtype, tuple(whole.shape)).copy_(whole.detach())
            held.root.lay(memory, State.FRESH)
        return tensor
