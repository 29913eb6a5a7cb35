"""Put what was committed over what a model was made with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property

import torch

from diskoffload.cache.disk import DiskCache
from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.errors import CommitError, DamagedFileError
from diskoffload.residency.held import Held
from diskoffload.residency.resident import Residency
from diskoffload.residency.storages import ViewBacking
from diskoffload.store.commits import Entry
from diskoffload.store.compression import Compression
from diskoffload.store.folder import Folder
from diskoffload.store.json_reader import brief
from diskoffload.store.shard import Shard
from diskoffload.store.stored import Stored, StridedTensor, stored_tensors


class Overlay:
    """Puts what was committed into a model whose tensors are those it was made with."""

    def __init__(
        self,
        model: torch.nn.Module,
        folder: Folder,
        shard_of: Callable[[str], Shard],
        residency: Residency,
        compression: Compression,
        align: bool,
    ) -> None:
        """Take a model all of whose modules are offloaded to the folder.

        Args:
            model: the model.
            folder: where its changes go.
            shard_of: gives a committed file by its name.
            residency: as of the model's caches.
            compression: as of the model's caches.
            align: as of the model's backings.
        """
        self._shard_of = shard_of
        self._model = model
        self._folder = folder
        self._residency = residency
        self._compression = compression
        self._align = align
        self._held: dict[str, Held] = {}
        self._tensors: dict[str, Mapping[str, Stored]] = {}

    def lay(self, entries: Mapping[str, Entry]) -> None:
        """Bind every entry; those that refer to others come after them."""
        others: dict[str, Held] = {}
        for prefix, module in self._model.named_modules():
            for mapping in (module._parameters, module._buffers):
                assert isinstance(mapping, DiskCache)  # it was opened, or attached here
                for key, held in mapping.held_items():
                    if held is not None:
                        others[f"{prefix}.{key}" if prefix else key] = held
        for name, entry in entries.items():
            if isinstance(entry["at"], list):
                self._held[name] = self._stored(name, entry, others.get(name))
        for name, entry in entries.items():
            at = entry["at"]
            if isinstance(at, dict) and "source" in at:
                known = self._known(others, at["source"], name)
                # A root has the bytes of an entry that becomes a view of it.
                is_root = entry["is"] == "root"
                self._held[name] = (
                    Held(at["source"], known.backing, template=known.offloaded.detach())
                    if is_root
                    else known
                )
        for name, entry in entries.items():
            at = entry["at"]
            if not isinstance(at, dict):
                continue
            if "view" in at:
                self._held[name] = self._view(name, entry)
        for name, entry in entries.items():
            at = entry["at"]
            if isinstance(at, dict) and "tie" in at:
                tied = self._held.get(at["tie"]) or self._known(others, at["tie"], name)
                self._held[name] = tied
        for held in others.values():
            _train(held, True)  # what is frozen has an entry
        for name, entry in entries.items():
            if entry["is"] != "root":
                self._show(name, entry)

    def _known(self, others: Mapping[str, Held], name: str, wanted_for: str) -> Held:
        if name not in others:
            raise CommitError(
                f"the commit in {self._folder.path} says that {wanted_for!r} is {name!r}, which "
                "neither it nor the model has; build the model as it was"
            )
        return others[name]

    def _stored(self, name: str, entry: Entry, before: Held | None) -> Held:
        file, key = entry["at"]
        if file not in self._tensors:
            self._tensors[file] = stored_tensors(self._shard_of(file))
        if key not in self._tensors[file]:
            raise DamagedFileError(
                f"{self._folder.path / file} does not hold {brief(key)}, which was committed as "
                f"{brief(name)}: the journal is damaged; restore both from a copy"
            )
        stored: Stored = self._tensors[file][key]
        if "strides" in entry:
            stored = StridedTensor(stored, tuple(entry["strides"]))
        backing = DiskBacking(self._folder, self._compression, stored, align=self._align)
        meta = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        if isinstance(stored, StridedTensor):
            meta = torch.empty_strided(
                stored.shape, stored.strides, dtype=stored.dtype, device="meta"
            )
        return Held(name, backing, template=_template(meta, entry, before))

    def _view(self, name: str, entry: Entry) -> Held:
        at = entry["at"]
        root = self._held[at["view"]]
        if root.views is None:
            root.views = weakref.WeakSet()
        dtype = getattr(torch, at["dtype"])
        backing = ViewBacking.from_description(self._residency, root, at, dtype)
        meta = torch.empty_strided(at["shape"], at["strides"], dtype=dtype, device="meta")
        return Held(name, backing, template=_template(meta, entry, None))

    def _show(self, name: str, entry: Entry) -> None:
        module, key = self._place_of(name)
        parameters, buffers = module._parameters, module._buffers
        assert isinstance(parameters, DiskCache)
        assert isinstance(buffers, DiskCache)
        wanted, other = parameters, buffers
        if entry["is"] != "parameter":
            wanted, other = buffers, parameters
        if entry["is"] == "gone":
            parameters.discard(key)
            buffers.discard(key)
            return
        other.discard(key)
        if entry["at"] is None:
            wanted[key] = None
            return
        if entry["is"] == "unsaved buffer":
            module._non_persistent_buffers_set.add(key)
        else:
            module._non_persistent_buffers_set.discard(key)
        if entry["is"] == "parameter":
            _train(self._held[name], entry["grad"])
        wanted.bind_lazily(key, self._held[name])

    def _place_of(self, name: str) -> tuple[torch.nn.Module, str]:
        """Find the module that a full name is of, and the name in it."""
        prefix, _, key = name.rpartition(".")
        with suppress(AttributeError):
            return self._model.get_submodule(prefix), key
        if name in self._dotted:
            return self._dotted[name]
        raise CommitError(
            f"the commit in {self._folder.path} has {name!r} and the model has no module "
            f"{prefix!r}: it was added after the model was made; add it before reopening"
        )

    @cached_property
    def _dotted(self) -> dict[str, tuple[torch.nn.Module, str]]:
        """By full name, what has dots in its own: who writes to ``_parameters`` can do that."""
        return {
            f"{prefix}.{key}" if prefix else key: (module, key)
            for prefix, module in self._model.named_modules()
            for mapping in (module._parameters, module._buffers)
            if isinstance(mapping, DiskCache)
            for key in mapping.born
            if "." in key
        }


def _train(held: Held, wanted: bool) -> None:
    standin = held.offloaded
    if isinstance(standin, torch.nn.Parameter) and (
        standin.is_floating_point() or standin.is_complex()
    ):
        standin.requires_grad_(wanted)


def _template(meta: torch.Tensor, entry: Entry, before: Held | None) -> torch.Tensor:
    """Make what stands for a tensor that was not read yet, of the class it has in the model."""
    if entry["is"] != "parameter":
        return meta
    made = torch.nn.Parameter(meta, requires_grad=entry["grad"])
    if before is not None and isinstance(before.offloaded, torch.nn.Parameter):
        made.__class__ = type(before.offloaded)
    return made
