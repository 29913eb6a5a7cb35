"""Move what a model still uses out of files that are mostly dead, while it is in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from diskoffload.cache.disk_backing import DiskBacking
from diskoffload.residency.held import Held
from diskoffload.residency.resident import Residency
from diskoffload.store.compaction import is_mostly_dead
from diskoffload.store.encoded import EncodedTensor
from diskoffload.store.folder import Folder
from diskoffload.store.header import StoredSpec
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor, StridedTensor
from diskoffload.store.writer import Ticket

# A commit after each small change leaves a small file each; each is a mapping too, of which a
# process may have 65530. So many of them become one.
SMALL_BYTES = 8 << 20
MOST_SMALL_FILES = 64

Live = dict[str, dict[str, int]]
"""What of files is in use: by a file's name and the tensor's in it, how many bytes."""


def leave_dead_files(folder: Folder, entries: Mapping[Held, Residency]) -> None:
    """Write anew what entries have in files that are mostly dead, or small and too many.

    Args:
        folder: the folder.
        entries: all whose values are in the folder, with their books, whose locks are held.

    Raises:
        DamagedFileError: a value is not what was written; it stays where it is.
        StorageError: the disk refused; everything stays where it is.
    """
    leave_files(folder, dead_files(folder, live_in(folder, entries)), entries)


def live_in(folder: Folder, entries: Iterable[Held]) -> Live:
    """Tell what entries have in a folder's files."""
    live: Live = {}
    for held in entries:
        place = _place_of(held)
        if place is not None and folder.owns(place[0]):
            live.setdefault(place[0].path.name, {})[place[1].name] = place[1].nbytes
    return live


def dead_files(folder: Folder, live: Live) -> set[str]:
    """Name files that are mostly dead, or small and too many, if no more is in use than this."""
    shards = [shard for shard in folder.shards() if shard.path.name in live]
    small = {shard.path.name for shard in shards if shard.header.file_bytes < SMALL_BYTES}
    dead = {
        name
        for shard in shards
        if is_mostly_dead(shard, sum(live[name := shard.path.name].values()))
    }
    return dead | small if len(small) > MOST_SMALL_FILES else dead


def leave_files(folder: Folder, names: Set[str], entries: Mapping[Held, Residency]) -> None:
    """Write anew what entries have in some files of the folder.

    A file of which anything is in use, and so mapped, is left alone until the next time.
    Each value is compared with its checksum on the way. Arguments and errors are those of
    :func:`leave_dead_files`.
    """
    inside: dict[Shard, list[Held]] = {}
    for held in entries if names else ():
        place = _place_of(held)
        if place is not None and place[0].path.name in names and folder.owns(place[0]):
            inside.setdefault(place[0], []).append(held)
    movable = [
        held
        for group in inside.values()
        if all(entries[held].vacate_mapped(held) for held in group)
        for held in group
    ]
    tickets: list[tuple[Held, Ticket]] = []
    try:
        for held in movable:
            backing: Any = held.backing
            value = backing.stored.load()
            tickets.append((held, folder.put(held.name, value, backing.compression)))
        if tickets:
            folder.flush()
    except BaseException:
        for _, ticket in tickets:
            ticket.cancel()
        raise
    for held, ticket in tickets:
        assert held.backing is not None  # its value was there
        held.backing = held.backing.succeed(ticket)
        held.wake()


def _place_of(held: Held) -> tuple[Shard, StoredSpec] | None:
    backing = held.backing
    stored = backing.stored if isinstance(backing, DiskBacking) else None
    if held.ticket is not None and held.ticket.stored is not None:
        stored = held.ticket.stored  # it is written, and somebody has the object still
    if isinstance(stored, StridedTensor):
        stored = stored.inner
    if isinstance(stored, (ShardTensor, EncodedTensor)):
        return stored.shard, stored.spec
    return None
