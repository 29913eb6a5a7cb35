"""Tensors that wait on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.base import Device, OffloadCache
from diskoffload.cache.compacting import leave_dead_files
from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.errors import InvalidInputError, StorageError
from diskoffload.residency.held import Backing, Held, State
from diskoffload.residency.resident import Residency
from diskoffload.store.compression import Compression, check_compression
from diskoffload.store.folder import Folder
from diskoffload.store.open_folders import open_folders
from diskoffload.system.memory import (
    empty,
)

_log = logging.getLogger(__name__)


class DiskCache(OffloadCache, kind="disk"):
    """Offloads to safetensors shards in a folder, and reads them through private mappings.

    Uncompressed tensors on the CPU alias the mapping: a read costs nothing but the page
    cache, and memory is the kernel's to take back. Others are loaded when they are read,
    and leave when nothing uses them.

    Attributes:
        offload_dir: the folder that offloaded tensors are written to.
        compression: what was chosen for what is written.
    """

    __slots__ = ("compression", "folder")

    offload_device = "disk"
    compression: Compression
    folder: Folder

    def __init__(
        self,
        onload_device: Device,
        offload_device: Device | None = None,
        offload_dir: Folder | Path | str | None = None,
        *,
        compression: Compression = None,
        name: str = "",
        residency: Residency | None = None,
    ) -> None:
        """Start empty.

        Args:
            onload_device: where reads bring tensors.
            offload_device: ``"disk"`` or ``None``.
            offload_dir: a folder on a disk, made if need be; several caches may name the
                same. ``None`` takes a fresh temporary one that goes with its owner.
            compression: ``"zstd"``: what is written is compressed without loss, where that
                saves at least a tenth. ``"auto"``: the same if the folder's disk is slower than
                decoding is, both measured once a folder, in a second at the most, at the first
                write; the log says what was found. Or a function that is given a tensor's full
                name and the tensor, and says one of these words, or ``None``, or ``True`` and
                ``False`` for ``"zstd"`` and ``None``; it may be called at every write, in any
                thread that reads or writes the model, and should say the same each time.
                ``None``: nothing is compressed.
            name: full name of the module in the model.
            residency: keeps the books of what is in memory.

        Raises:
            InvalidInputError: no such device or compression.
            FolderInUseError: another process owns the folder.
            StorageError: the folder cannot be made or locked.
        """
        super().__init__(onload_device, offload_device, name=name, residency=residency)
        check_compression(compression)
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

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Give some rows of an entry as a new tensor on the onload device.

        Where the value waits on disk, only the bytes of these rows are read, and of a
        compressed one only the chunks that have some of them (1 MiB of the value each) are
        decoded; nothing else comes into memory or stays there. Chunks are compared with their
        checksums. What is not compressed has one for the whole tensor, which some of its rows
        cannot be compared with: ``verify`` does, or ``verify="first_read"``.

        Edits made so far are in it; an edit of it is no edit of the entry. Thread-safe.

        Args:
            name: the entry.
            start: the first row, counted from 0 along the first dimension.
            stop: the row after the last; at least ``start``, at most the dimension's length.

        Raises:
            KeyError: there is no such entry.
            InvalidInputError: there are no such rows.
            DamagedFileError: a chunk is not what was written.
            StorageError: the file cannot be read.
        """
        held = self._held[name]
        shape = () if held is None else tuple(held.offloaded.shape)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise InvalidInputError(
                f"cannot read rows {start} to {stop} of {self._full_name(name)!r}: "
                + (f"it has the shape {shape}" if held is not None else "it is None")
            )
        assert held is not None  # it has a shape
        with self.residency.lock:
            backing = held.backing
            waits = held.state is State.VACANT and isinstance(backing, DiskBacking)
            stored = backing.stored if waits and isinstance(backing, DiskBacking) else None
        if stored is not None:
            return stored.load_rows(start, stop).to(self.onload_device)
        value = self.residency.onload(held, self.onload_device)
        with torch.no_grad():
            return value[start:stop].detach().clone()

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
        self._compact()

    def _compact(self) -> None:
        """Bound the garbage in the folder: files of which most was replaced are left."""
        residency = self.residency
        with residency.lock:
            mine = [held for held in residency.known() if self._is_mine(held)]
            leave_dead_files(self.folder, dict.fromkeys(mine, residency))

    def _new(self, key: Any, value: torch.Tensor) -> Held:
        held = super()._new(key, value)
        if self.folder.has_doubled():
            try:
                self._compact()
            except StorageError as error:  # whoever assigns is not to be told: nothing is lost
                _log.warning("could not give back space in %s: %s", self.folder.path, error)
        return held

    def is_made_with(self, onload_device: torch.device, options: Mapping[str, Any]) -> bool:
        """Whether a new cache made with these options would hold every entry just as this does.

        Args:
            onload_device: where it should bring tensors.
            options: all the others of the constructor, ``offload_dir`` as a folder.
        """
        if (
            len(options) != 4
            or onload_device != self.onload_device
            or options["name"] != self.name
            or options["offload_dir"] is not self.folder
            or options["residency"] is not self.residency
            or options["compression"] != self.compression
        ):
            return False
        return all(held is None or self._is_based_here(held) for held in self._held.values())

    def _is_based_here(self, held: Held) -> bool:
        backing = held.root.backing
        return backing is None or (
            isinstance(backing, DiskBacking)
            and backing.folder is self.folder
            and backing.compression == self.compression
        )

    def _is_mine(self, held: Held) -> bool:
        backing = held.root.backing
        return isinstance(backing, DiskBacking) and backing.folder is self.folder

    def _back(self, tensor: torch.Tensor) -> tuple[Backing, State, bool]:
        if tensor.is_meta:
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
