"""Give back the space of files of which little is still referred to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diskoffload.errors import CommitError
from diskoffload.store.commits import Committed, Entry
from diskoffload.store.folder import Folder
from diskoffload.store.header import StoredSpec
from diskoffload.store.shard import Shard
from diskoffload.store.stored import RAW, stored_tensors

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


def is_mostly_dead(shard: Shard, live: Iterable[StoredSpec]) -> bool:
    """Tell whether a file should be written anew, from the tensors of it that are in use."""
    data_bytes = shard.header.file_bytes - shard.header.data_offset
    live_bytes = sum(spec.nbytes for spec in {spec.name: spec for spec in live}.values())
    return live_bytes < data_bytes * _LEAST_LIVE_SHARE


def compact_folder(folder: Folder, *, dry_run: bool = False) -> Compaction:
    """Compact what was committed in a folder that no model uses now.

    Every tensor that moves is compared with its checksum. The new files are committed before
    the old ones go, so a crash at any moment loses nothing.

    Args:
        folder: just opened.
        dry_run: change nothing, say what would be done.

    Raises:
        CommitError: nothing was committed.
        DamagedFileError: a tensor is not what was written; nothing was changed.
        StorageError: the disk refused; what was committed is as it was.
    """
    last = folder.last_commit
    if not last.number:
        raise CommitError(f"nothing was committed in {folder.path}: there is nothing to compact")
    live: dict[str, dict[str, list[str]]] = {name: {} for name in last.shards}
    for name, entry in last.entries.items():
        if isinstance(entry["at"], list):
            file, key = entry["at"]
            live[file].setdefault(key, []).append(name)
    shards = {name: folder.committed_shard(name) for name in last.shards}
    dead = [
        name
        for name, shard in shards.items()
        if is_mostly_dead(shard, [shard.header.specs[key] for key in live[name]])
    ]
    specs = [shards[name].header.specs[key] for name in dead for key in live[name]]
    moved_bytes = sum(spec.nbytes for spec in specs)
    sizes = sum(last.shards[name][0] for name in dead)
    found = Compaction(len(dead), moved_bytes, max(0, sizes - moved_bytes))
    if dead and not dry_run:
        _move(folder, last, shards, {name: live[name] for name in dead})
    return found


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
            codec = getattr(stored[key], "codec_name", RAW)
            codec = None if codec == RAW else codec
            tickets.append((folder.put(names[0], tensor, codec), names))
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
