"""Move what a model still uses out of files that are mostly dead, while it is in use."""

from __future__ import annotations

from collections.abc import Mapping
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


def leave_dead_files(folder: Folder, entries: Mapping[Held, Residency]) -> int:
    """Write anew what entries have in files that are mostly dead, or small and too many.

    A file of which anything is in use, and so mapped, is left alone until the next time.
    Each value is compared with its checksum on the way.

    Args:
        folder: the folder.
        entries: every entry of the model whose value is in the folder, with its books, whose
            locks are held.

    Returns:
        How many files nothing of the model is in any more.

    Raises:
        DamagedFileError: a value is not what was written; it stays where it is.
        StorageError: the disk refused; everything stays where it is.
    """
    inside: dict[Shard, list[tuple[Held, StoredSpec]]] = {}
    for held in entries:
        shard_and_spec = _place_of(held)
        if shard_and_spec is not None and folder.owns(shard_and_spec[0]):
            inside.setdefault(shard_and_spec[0], []).append((held, shard_and_spec[1]))
    small = [shard for shard in inside if shard.header.file_bytes < SMALL_BYTES]
    too_many = set(small) if len(small) > MOST_SMALL_FILES else set()
    dead = [
        [held for held, _ in pairs]
        for shard, pairs in inside.items()
        if shard in too_many or is_mostly_dead(shard, [spec for _, spec in pairs])
    ]
    movable = [group for group in dead if all(entries[held].vacate_mapped(held) for held in group)]
    tickets: list[tuple[Held, Ticket]] = []
    try:
        for held in [held for group in movable for held in group]:
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
    return len(movable)


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
