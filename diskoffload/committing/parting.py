"""Which mappings of a model a commit has to look at, and what it may say of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

import torch

from diskoffload.cache.compacting import (
    MOST_SMALL_FILES,
    SMALL_BYTES,
    Live,
    dead_files,
    leave_files,
    live_in,
)
from diskoffload.committing.resting import Rest, is_still, lay_to_rest, rest_of
from diskoffload.committing.shown import Face
from diskoffload.residency.held import Held
from diskoffload.residency.resident import Residency
from diskoffload.store.commits import Entry
from diskoffload.store.folder import Folder

# Of a file that values in memory were committed to: what of it may be dead however little lives,
# and what its header has for each tensor, about.
_LEAST_DEAD_BYTES = 1 << 20
_ENTRY_BYTES = 256


class Parting:
    """The mappings of one model at one commit. Used under the locks of its books.

    Attributes:
        awake: those to be looked at; all, until the others are set aside.
        rests: what the last commit says of the others.
        left: names of files that values in memory are not to be left in.
    """

    def __init__(self, faces: list[Face], folder: Folder) -> None:
        self.awake = faces
        self.rests: list[Rest] = []
        self.left: set[str] = set()
        self._folder = folder
        # Of two modules with one mapping (copy.copy makes them) each entry is a tie.
        seen = Counter(id(one.cache) for one in faces if one.cache is not None)
        self._shared = {key for key, count in seen.items() if count > 1}
        self._laid: list[tuple[Face, Rest]] = []

    def set_aside(self) -> None:
        """Leave awake only what has to be looked at, and move it out of files that are mostly dead.

        What is in a file that is to be left, or that was lost, has to be, however long it rests.

        Raises:
            DamagedFileError: a value that is to move is not what was written.
            StorageError: the disk refused.
        """
        folder = self._folder
        rests = [
            None if id(face.cache) in self._shared else rest_of(face, folder.resting)
            for face in self.awake
        ]
        live = live_in(folder, self._entries_in_files(rests))
        for rest in rests:
            for file, specs in rest.live.items() if rest is not None else ():
                live.setdefault(file, {}).update(specs)
        dead = dead_files(folder, live)
        self.left = _files_to_leave(folder, live)
        doubtful = dead | self.left | folder.suspects
        for number, rest in enumerate(rests):
            if rest is not None and not doubtful.isdisjoint(rest.all_files):
                rests[number] = None
        leave_files(folder, dead, self._entries_in_files(rests))
        self.awake = [face for face, rest in zip(self.awake, rests, strict=True) if rest is None]
        self.rests = [rest for rest in rests if rest is not None]

    def hide(self) -> list[Held]:
        """Hide what nobody uses, so that it stays as this commit is about to see it; give that."""
        alone = [face for face in self.awake if id(face.cache) not in self._shared]
        self._laid = [(face, rest) for face in alone if (rest := lay_to_rest(face)) is not None]
        return [one for face, _ in self._laid for one in face.held() if one.tensor is not None]

    def noted(self, entries: Mapping[str, Entry], in_memory: Set[str]) -> set[object]:
        """Note what this commit says of what was hidden, if nobody was given anything of it since.

        Args:
            entries: the commit's.
            in_memory: names of those whose values are in memory, and were written for the commit.

        Returns:
            All that the next commit may rely on, once this one is made.
        """
        resting: set[object] = set(self.rests)
        for face, rest in self._laid:
            held = face.held()
            if not held or not is_still(rest, held):
                continue
            rest.names = [one.name for one in face.shown()] + list(face.born())
            rest.entries = {name: entries[name] for name in rest.names if name in entries}
            rest.live = live_in(self._folder, held)
            rest.in_memory = [name for name in rest.names if name in in_memory]
            places = [entry["at"] for entry in rest.entries.values()]
            rest.files = {place[0] for place in places if isinstance(place, list)}
            resting.add(rest)
        return resting

    def _entries_in_files(self, rests: list[Rest | None]) -> dict[Held, Residency]:
        """Give the entries, and their books, of all mappings that do not rest."""
        return {
            held.root: face.cache.residency
            for face, rest in zip(self.awake, rests, strict=True)
            if rest is None and face.cache is not None
            for held in face.held()
        }


def _files_to_leave(folder: Folder, live: Live) -> set[str]:
    """Find files that values in memory were committed to, and little else is alive in."""
    live_bytes: Counter[str] = Counter()
    for (_, dtype, shape, _), entry in folder.remembered.values():
        live_bytes[entry["at"][0]] += _bytes_of(dtype, shape) + _ENTRY_BYTES
    files = set(live_bytes)
    if not files:
        return files
    for name in files & live.keys():
        live_bytes[name] += sum(live[name].values())
    sizes = {name: size for name, (size, _) in folder.last_commit.shards.items()}
    small = {name for name in files if sizes.get(name, 0) < SMALL_BYTES}
    return (small if len(small) > MOST_SMALL_FILES else set()) | {
        name
        for name in files
        if sizes.get(name, 0) - live_bytes[name] > max(live_bytes[name], _LEAST_DEAD_BYTES)
    }


def _bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
