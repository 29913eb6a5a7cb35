"""Give back the space of files of which little is still referred to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diskoffload.errors import CommitError
from diskoffload.store.commits import Commits, Committed, Entry
from diskoffload.store.folder import Folder, open_committed
from diskoffload.store.journal import Journal
from diskoffload.store.shard import Shard
from diskoffload.store.stored import stored_tensors
from diskoffload.system.files import Files

# A file is written anew once more of it is dead than alive: each byte is then copied at most
# once for each byte that died, and garbage is never more than what is alive.
_LEAST_LIVE_SHARE = 0.5


@dataclass(frozen=True)
class Compaction:
    """What compacting did.

    Attributes:
        files: how many files were given back.
        moved_bytes: how much of them was still alive and was written anew.
        freed_bytes: how much smaller the folder is.
    """

    files: int = 0
    moved_bytes: int = 0
    freed_bytes: int = 0


def is_mostly_dead(shard: Shard, live_bytes: int) -> bool:
    """Tell whether a file should be written anew, from what of its data is in use."""
    data_bytes = shard.header.file_bytes - shard.header.data_offset
    return live_bytes < data_bytes * _LEAST_LIVE_SHARE


@dataclass(frozen=True)
class _Dead:
    """The files of a commit that should be written anew, and by key who refers to what is alive."""

    shards: Mapping[str, Shard]
    live: Mapping[str, Mapping[str, list[str]]]

    def compaction(self, last: Committed) -> Compaction:
        moved_bytes = sum(
            self.shards[name].header.specs[key].nbytes
            for name in self.live
            for key in self.live[name]
        )
        sizes = sum(last.shards[name][0] for name in self.live)
        return Compaction(len(self.live), moved_bytes, max(0, sizes - moved_bytes))


def planned_compaction(path: Path) -> Compaction:
    """Tell what compacting a folder would do. Nothing is changed, and it may be in use.

    Raises:
        CommitError: nothing was committed.
        DamagedFileError: the journal or a file is not what was written.
        StorageError: something cannot be read.
    """
    files = Files()
    last = Commits(Journal(path, files)).last
    _check_any(last, path)
    return _dead(last, lambda name: open_committed(path, name, last, files)).compaction(last)


def compact_folder(folder: Folder) -> Compaction:
    """Compact what was committed in a folder that no model uses now.

    Every tensor that moves is compared with its checksum. The new files are committed before
    the old ones go, so a crash at any moment loses nothing.

    Args:
        folder: just opened.

    Raises:
        CommitError: nothing was committed.
        DamagedFileError: a tensor is not what was written; nothing was changed.
        StorageError: the disk refused; what was committed is as it was.
    """
    last = folder.last_commit
    _check_any(last, folder.path)
    dead = _dead(last, folder.committed_shard)
    found = dead.compaction(last)
    if dead.live:
        _move(folder, last, dead.shards, dead.live)
    return found


def _check_any(last: Committed, path: Path) -> None:
    if not last.number:
        raise CommitError(f"nothing was committed in {path}: there is nothing to compact")


def _dead(last: Committed, shard_of: Callable[[str], Shard]) -> _Dead:
    live: dict[str, dict[str, list[str]]] = {name: {} for name in last.shards}
    for name, entry in last.entries.items():
        if isinstance(entry["at"], list):
            file, key = entry["at"]
            live[file].setdefault(key, []).append(name)
    shards = {name: shard_of(name) for name in last.shards}
    dead = {
        name: live[name]
        for name, shard in shards.items()
        if is_mostly_dead(shard, sum(shard.header.specs[key].nbytes for key in live[name]))
    }
    return _Dead(shards, dead)


def _move(
    folder: Folder,
    last: Committed,
    shards: Mapping[str, Shard],
    live: Mapping[str, Mapping[str, list[str]]],
) -> None:
    tickets: list[tuple[Any, list[str]]] = []
    for file, keys in live.items():
        stored = stored_tensors(shards[file])
        for key, names in keys.items():
            tensor = stored[key].load()
            compression = getattr(stored[key], "compression", None)
            tickets.append((folder.put(names[0], tensor, compression), names))
    folder.flush()
    entries: dict[str, Entry] = dict(last.entries)
    new: dict[str, Shard] = {}
    for ticket, names in tickets:
        assert ticket.stored is not None  # the flush returned
        new[ticket.stored.shard.path.name] = ticket.stored.shard
        for name in names:
            place = [ticket.stored.shard.path.name, ticket.stored.spec.name]
            entries[name] = {**entries[name], "at": place}
    kept = {name: size for name, size in last.shards.items() if name not in live}
    folder.commit(replace(last, entries=entries, shards=kept), new.values())
