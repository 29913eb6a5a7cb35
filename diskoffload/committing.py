"""Commit a model: from then on a crash costs nothing of what it holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diskoffload.cache.base import OffloadCache
from diskoffload.cache.compacting import leave_dead_files
from diskoffload.cache.disk import DiskCache
from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.checkpoint.fingerprint import fingerprint_of
from diskoffload.checkpoint.open import Binding, binding_of
from diskoffload.errors import (
    CommitError,
    InvalidInputError,
    NotOffloadedError,
    UnsupportedTensorError,
)
from diskoffload.residency.held import Held, State
from diskoffload.residency.resident import Residency, current_value
from diskoffload.residency.storages import ViewBacking
from diskoffload.store.commits import Commits, Committed, Entry
from diskoffload.store.folder import Folder
from diskoffload.store.journal import Journal
from diskoffload.store.shard import Shard
from diskoffload.store.stored import EncodedTensor, ShardTensor, Stored, StridedTensor
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.files import Files

_log = logging.getLogger(__name__)
_Value = Held | torch.Tensor
# How often a tensor that another thread keeps changing is written before it is given up.
_MOST_TRIES = 3


def commit(model: torch.nn.Module, note: Any = None) -> Committed:
    """Make the present value of every tensor of a model durable, at one stroke.

    After a kill, a power cut or an error at any moment, :func:`diskoffload.reopen` gives the
    model as it was at the last commit that returned. Only what has changed since the commit
    before is written: tensors offloaded to disk that are there already are not written again,
    and of an opened checkpoint nothing is that is unchanged. Tensors that the model holds in
    memory (plain modules, ``CPUCache``) are written to the folder as well.

    Args:
        model: a model of which at least some modules are offloaded to disk, all to one folder.
        note: what the caller wants to find again, anything that JSON can say; for example
            the layers that are done. Given back by :func:`diskoffload.last_commit`.

    Returns:
        What was committed; ``number`` counts the folder's commits from 1.

    Raises:
        NotOffloadedError: nothing of the model is offloaded to disk.
        InvalidInputError: its modules are offloaded to several folders, or the note cannot be
            written as JSON.
        CommitError: the folder holds the commits of another model or run.
        ClosedError: the folder was closed, or belongs to the parent process.
        UnsupportedTensorError: a tensor has no value that could be written.
        StorageError: the disk refused. What was committed before is as it was, and once the
            cause is gone the next call commits everything.

    Thread-safe; other threads wait while values are collected, not while they are written.
    Commits to one folder wait for each other: the later one has what the earlier one has.
    """
    folder = _folder_of(model)
    try:
        note = json.loads(json.dumps(note))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the note cannot be written as JSON: {error}") from error
    folder.check_open("a commit")  # in a child of a fork the turn may be taken for ever
    with folder.turn:
        folder.claim_commits(model)
        return _Collection(model, folder).commit(note)


def last_commit(where: torch.nn.Module | Path | str) -> Committed:
    """Tell what was committed last; its number is 0 if nothing was.

    Args:
        where: a model, or an offload folder, which may be in use or not be there at all.

    Raises:
        NotOffloadedError: nothing of the model is offloaded to disk.
        InvalidInputError: its modules are offloaded to several folders.
        DamagedFileError: the folder's journal is damaged.
    """
    if isinstance(where, torch.nn.Module):
        return _folder_of(where).last_commit
    return Commits(Journal(Path(where).expanduser().absolute(), Files())).last


def _folder_of(model: torch.nn.Module) -> Folder:
    folders = {
        id(cache.folder): cache.folder
        for module in model.modules()
        for cache in (module._parameters, module._buffers)
        if isinstance(cache, DiskCache)
    }
    if not folders:
        raise NotOffloadedError(
            f"nothing of this {type(model).__name__} is offloaded to disk, so there is no folder "
            "to commit to; open it with open_checkpoint or offload it with offload_dir"
        )
    if len(folders) > 1:
        places = sorted(str(folder.path) for folder in folders.values())
        raise InvalidInputError(
            f"the model is offloaded to {len(folders)} folders ({', '.join(places)}), and a commit "
            "is one folder's; offload all of it to one offload_dir"
        )
    return next(iter(folders.values()))


@dataclass(frozen=True)
class _Shown:
    """One name of the model, and what it shows."""

    name: str
    is_parameter: bool
    persistent: bool
    value: _Value | None

    def described(self, entry: Entry) -> Entry:
        if not self.is_parameter:
            return {**entry, "is": "buffer" if self.persistent else "unsaved buffer"}
        grad = self.value is not None and self.value.requires_grad
        return {**entry, "is": "parameter", "grad": grad}

    def is_frozen(self, dtype: torch.dtype) -> bool:
        can_train = self.is_parameter and (dtype.is_floating_point or dtype.is_complex)
        return can_train and self.value is not None and not self.value.requires_grad


def _shown(model: torch.nn.Module) -> Iterator[_Shown]:
    for prefix, module in model.named_modules():
        for mapping in (module._parameters, module._buffers):
            entries: Any = mapping
            pairs = entries.held_items() if isinstance(entries, OffloadCache) else entries.items()
            for key, value in list(pairs):
                name = f"{prefix}.{key}" if prefix else key
                persistent = key not in module._non_persistent_buffers_set
                yield _Shown(name, mapping is module._parameters, persistent, value)


@dataclass
class _Collection:
    """The values of one commit, on their way into its table."""

    model: torch.nn.Module
    folder: Folder
    entries: dict[str, Entry] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    keys: dict[str, tuple[object, ...]] = field(default_factory=dict)
    unchanged: set[Held] = field(default_factory=set)

    def commit(self, note: Any) -> Committed:
        last = self.folder.last_commit
        with ExitStack() as locks:
            for residency in self._residencies():
                locks.enter_context(residency.lock)
                self.unchanged |= residency.sync(self._goes_here)
            shown = list(_shown(self.model))
            leave_dead_files(self.folder, self._entries_in_files())
            where = self._where(shown)
            source, names = self._source(last)
            self._describe(shown, where, names)
            values = {one.name: root for one in shown for root in _roots(one.value)}
            remembered: dict[str, tuple[object, Entry]] = {
                name: (key, self._at(where[id(values[name])])) for name, key in self.keys.items()
            }
        born = last.born
        if source is None and born is None:
            born = _born(self.model, shown)
        wanted = Committed(
            entries=self.entries,
            shards={name: last.shards[name] for name in self.reused},
            note=note,
            source=source,
            born=born,
        )
        made = self.folder.commit(wanted, self.shards.values())
        self.folder.remembered = remembered  # older ones may be in files that are gone now
        _log.info(
            "commit %d of %s: %d tensors in %d files",
            made.number,
            self.folder.path,
            len(made.entries),
            len(made.shards),
        )
        return made

    def _entries_in_files(self) -> dict[Held, Residency]:
        found: dict[Held, Residency] = {}
        for module in self.model.modules():
            for cache in (module._parameters, module._buffers):
                if isinstance(cache, OffloadCache):
                    held = [one.root for _, one in cache.held_items() if one is not None]
                    found.update(dict.fromkeys(held, cache.residency))
        return found

    def _residencies(self) -> list[Residency]:
        found = {
            id(cache.residency): cache.residency
            for module in self.model.modules()
            for cache in (module._parameters, module._buffers)
            if isinstance(cache, OffloadCache)
        }
        return [found[key] for key in sorted(found)]  # in one order, whoever commits

    # ------------------------------------------------------------------ where values are

    def _where(self, shown: list[_Shown]) -> dict[int, Stored | Entry]:
        """Have every value in a file; tell where, by the identity of what holds it."""
        values = {id(root): (root, one.name) for one in shown for root in _roots(one.value)}
        where: dict[int, Stored | Entry] = {}
        waiting = list(values.values())
        for _ in range(_MOST_TRIES):
            tickets = {}
            for value, name in waiting:
                found = self._found(value, name)
                if isinstance(found, Ticket):
                    tickets[id(value)] = found
                else:
                    where[id(value)] = found
            if not tickets:
                return where
            self.folder.flush()
            waiting = [pair for pair in waiting if id(pair[0]) in tickets]
            for value, name in waiting:
                ticket = tickets[id(value)]
                if ticket.stored is not None:
                    where[id(value)] = ticket.stored
                    # It may have been edited meanwhile; what counts is what was written.
                    self.keys[name] = (ticket.digest, *self.keys[name][1:])
            waiting = [pair for pair in waiting if id(pair[0]) not in where]
        raise CommitError(
            f"could not commit to {self.folder.path}: {waiting[0][1]!r} was not written though the "
            "writer says that all is; report this"
        )

    def _found(self, value: _Value, name: str) -> Stored | Entry | Ticket:
        """Tell where a value is; if it is in no file that a commit may name, have it written."""
        tensor: torch.Tensor | None = value if isinstance(value, torch.Tensor) else None
        if isinstance(value, Held):
            backing, tensor = value.backing, None
            if value not in self.unchanged:
                backing, tensor = current_value(value)
            if isinstance(backing, DiskBacking) and backing.stored is not None:
                stored = backing.stored
                doubtful = any(self.folder.is_suspect(shard) for shard in stored.shards)
                if not doubtful and (self._is_own(stored) or self._is_of_source(value, stored)):
                    return stored
                tensor = stored.load()
            elif tensor is None and backing is not None:
                tensor = backing.memory
        if tensor is None or not _has_value(tensor):
            raise UnsupportedTensorError(
                f"cannot commit {name!r}: it has no value that could be written "
                f"(a {type(value).__name__} on the meta device, or another stand-in)"
            )
        key = (digest_of(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
        self.keys[name] = key
        known, entry = self.folder.remembered.get(name, (None, {}))
        return entry if known == key else self.folder.put(name, tensor.detach(), None)

    def _goes_here(self, held: Held) -> bool:
        backing = held.root.backing
        return isinstance(backing, DiskBacking) and backing.folder is self.folder

    def _is_own(self, stored: Stored) -> bool:
        return all(self.folder.owns(shard) for shard in stored.shards)

    def _is_of_source(self, held: Held, stored: Stored) -> bool:
        binding = binding_of(self.model)
        return binding is not None and held.name in binding.recipes and not self._is_own(stored)

    # ------------------------------------------------------------------ the table

    def _source(self, last: Committed) -> tuple[dict[str, Any] | None, set[str]]:
        binding = binding_of(self.model)
        if binding is None:
            return None, set()
        names = {*binding.recipes, *_born_names(self.model)}
        if last.source is not None and last.source["path"] == str(binding.checkpoint.path):
            return dict(last.source), names
        return source_of(binding), names

    def _describe(
        self, shown: list[_Shown], where: dict[int, Stored | Entry], source_names: set[str]
    ) -> None:
        first: dict[int, str] = {}
        for one in shown:
            value = one.value
            if value is None:
                self.entries[one.name] = one.described({"at": None})
                continue
            tie = first.setdefault(_identity(value), one.name)
            if tie != one.name:
                self.entries[one.name] = one.described({"at": {"tie": tie}})
                continue
            if _is_view(value):
                assert isinstance(value, Held)
                assert isinstance(value.backing, ViewBacking)
                root = f"{one.name}#{id(value.root)}"
                root = first.setdefault(id(value.root), root)
                at: Entry = {"at": {"view": root, **value.backing.described()}}
                self.entries[one.name] = one.described(at)
                self.entries[root] = {**self._root_at(value.root, where), "is": "root"}
                continue
            found = where[id(value)]
            if not isinstance(found, dict) and not self._is_own(found):
                assert isinstance(value, Held)  # only entries lie in the source
                # Without an entry it is as the source says, and can be trained.
                if value.name != one.name or one.is_frozen(found.dtype):
                    self.entries[one.name] = one.described({"at": {"source": value.name}})
                continue
            self.entries[one.name] = one.described(self._at(found))
        for name in source_names - {one.name for one in shown}:
            self.entries[name] = {"at": None, "is": "gone"}

    def _root_at(self, root: Held, where: dict[int, Stored | Entry]) -> Entry:
        found = where[id(root)]
        in_source = not isinstance(found, dict) and not self._is_own(found)
        return {"at": {"source": root.name}} if in_source else self._at(found)

    def _at(self, found: Stored | Entry) -> Entry:
        if isinstance(found, dict):
            self.reused.add(found["at"][0])
            return found
        strides: tuple[int, ...] | None = None
        if isinstance(found, StridedTensor):
            strides = found.strides
            found = found.inner
        assert isinstance(found, (ShardTensor, EncodedTensor))  # the writer makes no other
        self.shards[found.shard.path.name] = found.shard
        entry: Entry = {"at": [found.shard.path.name, found.spec.name]}
        return entry if strides is None else {**entry, "strides": list(strides)}


def source_of(binding: Binding) -> dict[str, Any]:
    """Describe the checkpoint that a model was opened from, so that it is known again."""
    return {
        "path": str(binding.checkpoint.path),
        "dtype": None if binding.dtype is None else str(binding.dtype).removeprefix("torch."),
        "files": fingerprint_of(binding.checkpoint),
    }


def _roots(value: _Value | None) -> list[_Value]:
    if value is None:
        return []
    return [value.root if isinstance(value, Held) and _is_view(value) else value]


def _is_view(value: _Value) -> bool:
    """Whether an entry is a view of another's bytes, and has not been given others since."""
    return (
        isinstance(value, Held)
        and isinstance(value.backing, ViewBacking)
        and value.state is not State.FRESH
        and not value.is_changed()
    )


def _identity(value: _Value) -> int:
    # A tie between a plain and an offloaded module is one object behind two faces.
    tensor = value.tensor if isinstance(value, Held) else value
    return id(value if tensor is None else tensor)


def _has_value(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _born_names(model: torch.nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        f"{prefix}.{key}" if prefix else key: layout
        for prefix, module in model.named_modules()
        for cache in (module._parameters, module._buffers)
        if isinstance(cache, OffloadCache)
        for key, layout in cache.born.items()
    }


def _born(model: torch.nn.Module, shown: list[_Shown]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give dtype and shape of every tensor as it was offloaded; of plain modules, as it is."""
    layouts = {
        one.name: (one.value.dtype, tuple(one.value.shape))
        for one in shown
        if isinstance(one.value, torch.Tensor)
    }
    layouts.update(_born_names(model))
    return {
        name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in layouts.items()
    }
