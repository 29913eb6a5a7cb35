"""The table of a commit: where each value of a model is, once it is on disk."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import torch

from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.checkpoint.fingerprint import fingerprint_of
from diskoffload.checkpoint.open import Binding, binding_of
from diskoffload.committing.parting import Parting
from diskoffload.committing.shown import (
    Face,
    Shown,
    Value,
    has_value,
    identity,
    is_view,
)
from diskoffload.errors import CommitError, UnsupportedTensorError, listed
from diskoffload.residency.edits import unedited
from diskoffload.residency.held import Held
from diskoffload.residency.resident import Residency, current_value
from diskoffload.residency.storages import ViewBacking
from diskoffload.store.commits import Committed, Entry
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.folder import Folder
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, Stored, StridedTensor
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.collector import collector_paused

# How often a tensor that another thread keeps changing is written before it is given up.
_MOST_TRIES = 3


class Table:
    """The values of one commit, on their way into its table.

    What nobody can have changed since an earlier commit is not looked at: of it is said what
    that one said. So a commit costs a walk over the modules, and a look at what was in use.
    """

    def __init__(self, model: torch.nn.Module, folder: Folder, faces: list[Face]) -> None:
        self._folder = folder
        self._binding = binding_of(model)
        self._parts = Parting(faces, folder)
        self._entries: dict[str, Entry] = {}
        self._shards: dict[str, Shard] = {}
        self._reused: set[str] = set()
        self._keys: dict[str, tuple[object, ...]] = {}
        self._unchanged: set[Held] = set()

    def commit(self, note: Any) -> Committed:
        """Have every value on disk, and commit where they are; the folder's turn is held."""
        folder, last = self._folder, self._folder.last_commit
        with ExitStack() as locks:
            for residency in self._residencies():
                locks.enter_context(residency.lock)
                self._unchanged |= residency.sync(self._goes_here)
            # Now that what changed is written: the collector is not held up by the disk.
            locks.enter_context(collector_paused())
            self._parts.set_aside()
            self._take_over_what_rests()
            self._look_at_what_is_hidden(self._parts.hide())
            shown = [one for face in self._parts.awake for one in face.shown()]
            roots = [(one.name, root) for one in shown if (root := one.root) is not None]
            where = self._where(roots)
            source, names = self._source(last)
            self._describe(shown, where, names)
            values = dict(roots)
            remembered: dict[str, tuple[Any, Entry]] = {
                name: (key, self._at(where[id(values[name])])) for name, key in self._keys.items()
            }
            resting = self._parts.noted(self._entries, self._keys.keys())
        for rest in self._parts.rests:
            remembered.update({name: folder.remembered[name] for name in rest.in_memory})
        born = last.born
        if source is None and born is None:
            born = self._born(shown)
        wanted = Committed(
            entries=self._entries,
            shards={name: last.shards[name] for name in self._reused},
            note_text=json.dumps(note),
            source=source,
            born=born,
        )
        self._check_source()
        made = folder.commit(wanted, self._shards.values())
        folder.remembered = remembered  # older ones may be in files that are gone now
        folder.resting = resting
        return made

    def _take_over_what_rests(self) -> None:
        for rest in self._parts.rests:
            self._entries.update(rest.entries)
            self._reused |= rest.files
        self._shards.update(
            {name: one for one in self._folder.shards() if (name := one.path.name) in self._reused}
        )

    def _look_at_what_is_hidden(self, hidden: list[Held]) -> None:
        self._unchanged.difference_update(hidden)  # that was seen while it could be edited
        self._unchanged |= unedited(hidden) or set()

    def _check_source(self) -> None:
        """Refuse to refer to a checkpoint that is no longer what was opened."""
        binding = self._binding
        if binding is None:
            return
        shards = binding.checkpoint.shards.items()
        changed = [name for name, shard in shards if not shard.is_in_place()]
        if changed:
            raise CommitError(
                f"cannot commit to {self._folder.path}: the model reads from the checkpoint "
                f"{binding.checkpoint.path}, of which {listed(changed)} was changed, replaced or "
                "removed since it was opened, and reopening would find other weights; put it "
                "back, or keep the model with save_checkpoint"
            )

    def _residencies(self) -> list[Residency]:
        caches = [one.cache for one in self._parts.awake if one.cache is not None]
        found = {id(cache.residency): cache.residency for cache in caches}
        return [found[key] for key in sorted(found)]  # in one order, whoever commits

    # ------------------------------------------------------------------ where values are

    def _where(self, roots: list[tuple[str, Value]]) -> dict[int, Stored | Entry]:
        """Have every value in a file; tell where, by the identity of what holds it."""
        values = {id(root): (root, name) for name, root in roots}
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
            self._folder.flush()
            waiting = [pair for pair in waiting if id(pair[0]) in tickets]
            for value, name in waiting:
                ticket = tickets[id(value)]
                if ticket.stored is not None:
                    where[id(value)] = ticket.stored
                    # It may have been edited meanwhile; what counts is what was written.
                    self._keys[name] = (ticket.digest, *self._keys[name][1:])
            waiting = [pair for pair in waiting if id(pair[0]) not in where]
        raise CommitError(
            f"could not commit to {self._folder.path}: {waiting[0][1]!r} was not written though "
            "the writer says that all is; report this"
        )

    def _found(self, value: Value, name: str) -> Stored | Entry | Ticket:
        """Tell where a value is; if it is in no file that a commit may name, have it written."""
        tensor: torch.Tensor | None = value if isinstance(value, torch.Tensor) else None
        if isinstance(value, Held):
            backing, tensor = value.backing, None
            if value not in self._unchanged:
                backing, tensor = current_value(value)
            if isinstance(backing, DiskBacking) and backing.stored is not None:
                stored = backing.stored
                doubtful = any(one.path.name in self._folder.suspects for one in stored.shards)
                if not doubtful and (self._is_own(stored) or self._is_of_source(value, stored)):
                    return stored
                tensor = stored.load()
            elif tensor is None and backing is not None:
                tensor = backing.memory
        if tensor is None or not has_value(tensor):
            raise UnsupportedTensorError(
                f"cannot commit {name!r}: it has no value that could be written "
                f"(a {type(value).__name__} on the meta device, or another stand-in)"
            )
        key = (digest_of(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
        self._keys[name] = key
        known, entry = self._folder.remembered.get(name, (None, {}))
        if known == key and entry["at"][0] not in self._parts.left:
            return entry
        # Who is interrupted before it is written could not cancel it.
        return self._folder.put(name, tensor.detach(), None, stays_open=False)

    def _goes_here(self, held: Held) -> bool:
        if held.rest in self._folder.resting:
            return False
        backing = held.root.backing
        return isinstance(backing, DiskBacking) and backing.folder is self._folder

    def _is_own(self, stored: Stored) -> bool:
        return all(self._folder.owns(shard) for shard in stored.shards)

    def _is_of_source(self, held: Held, stored: Stored) -> bool:
        binding = self._binding
        if binding is None or held.name not in binding.recipes:
            return False
        source = {id(shard) for shard in binding.checkpoint.shards.values()}
        return all(id(shard.first) in source for shard in stored.shards)

    # ------------------------------------------------------------------ the table

    def _source(self, last: Committed) -> tuple[dict[str, Any] | None, set[str]]:
        binding = self._binding
        if binding is None:
            return None, set()
        names = {*binding.recipes, *(name for face in self._parts.awake for name in face.born())}
        if last.source is not None and last.source["path"] == str(binding.checkpoint.path):
            return dict(last.source), names
        return source_of(binding), names

    def _describe(
        self, shown: list[Shown], where: dict[int, Stored | Entry], source_names: set[str]
    ) -> None:
        first: dict[int, str] = {}
        for one in shown:
            value = one.value
            if value is None:
                self._entries[one.name] = one.described({"at": None})
                continue
            tie = first.setdefault(identity(value), one.name)
            if tie != one.name:
                self._entries[one.name] = one.described({"at": {"tie": tie}})
                continue
            if is_view(value):
                assert isinstance(value, Held)
                assert isinstance(value.backing, ViewBacking)
                root = f"{one.name}#{id(value.root)}"
                root = first.setdefault(id(value.root), root)
                at: Entry = {"at": {"view": root, **value.backing.described()}}
                self._entries[one.name] = one.described(at)
                self._entries[root] = {**self._root_at(value.root, where), "is": "root"}
                continue
            found = where[id(value)]
            if not isinstance(found, dict) and not self._is_own(found):
                assert isinstance(value, Held)  # only entries lie in the source
                # Without an entry it is as the source says, saved again, and can be trained.
                as_there = value.name == one.name and one.persistent
                if not as_there or one.is_frozen(found.dtype):
                    self._entries[one.name] = one.described({"at": {"source": value.name}})
                continue
            self._entries[one.name] = one.described(self._at(found))
        source_names.difference_update(one.name for one in shown)
        for rest in self._parts.rests:
            source_names.difference_update(rest.names)
        for name in source_names:
            self._entries[name] = {"at": None, "is": "gone"}

    def _root_at(self, root: Held, where: dict[int, Stored | Entry]) -> Entry:
        found = where[id(root)]
        in_source = not isinstance(found, dict) and not self._is_own(found)
        return {"at": {"source": root.name}} if in_source else self._at(found)

    def _at(self, found: Stored | Entry) -> Entry:
        if isinstance(found, dict):
            self._reused.add(found["at"][0])
            return found
        strides: tuple[int, ...] | None = None
        if isinstance(found, StridedTensor):
            strides = found.strides
            found = found.inner
        assert isinstance(found, (ShardTensor, EncodedTensor))  # the writer makes no other
        self._shards[found.shard.path.name] = found.shard
        entry: Entry = {"at": [found.shard.path.name, found.spec.name]}
        return entry if strides is None else {**entry, "strides": list(strides)}

    def _born(self, shown: list[Shown]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Give dtype and shape of every tensor as it was offloaded.

        What plain modules were built with nobody knows by now: of theirs only names are given.
        """
        plain = {one.name: ("", ()) for one in shown if isinstance(one.value, torch.Tensor)}
        offloaded = {
            name: (str(dtype).removeprefix("torch."), shape)
            for face in self._parts.awake
            for name, (dtype, shape) in face.born().items()
        }
        return {**plain, **offloaded}


def source_of(binding: Binding) -> dict[str, Any]:
    """Describe the checkpoint that a model was opened from, so that it is known again."""
    return {
        "path": str(binding.checkpoint.path),
        "dtype": None if binding.dtype is None else str(binding.dtype).removeprefix("torch."),
        "files": fingerprint_of(binding.checkpoint),
    }
