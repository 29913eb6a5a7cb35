"""What of a model nobody can have changed since a commit saw it, so that the next need not look."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from diskoffload.cache.compacting import Live
from diskoffload.committing.shown import Face
from diskoffload.residency.held import Held
from diskoffload.store.commits import Entry


@dataclass(eq=False, slots=True)
class Rest:
    """One mapping of a module as a commit saw it, when nobody had any of its tensors.

    All its entries refer to it (:attr:`Held.rest`) until somebody may have one's object. It
    refers to none of them, nor to files: both go when their time comes. It holds only as long as
    the last commit of a folder says what it says (:attr:`Folder.resting`): what is in memory may
    be of several models, and a module may be taken out of one and put back later.

    Attributes:
        layout: what of the mapping its entries do not know.
        names: full names of all that it shows, and of what it showed when it was offloaded.
        entries: what the commit says of them.
        live: what they have in the folder's files.
        in_memory: names of those whose values are in memory, and were written for the commit.
        files: names of the files that the entries name.
    """

    layout: tuple[object, ...]
    names: list[str] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    live: Live = field(default_factory=dict)
    in_memory: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    @property
    def all_files(self) -> set[str]:
        """Names of all files of the folder that have anything of it, be that an older value."""
        return self.files | self.live.keys()


def rest_of(face: Face, resting: Set[object]) -> Rest | None:
    """Give what the last commit says of a mapping, if that cannot have changed since.

    Args:
        face: the mapping.
        resting: what that commit relied on, and may be relied on again.
    """
    notes: set[object] = {held.rest for held in face.held()}
    note = notes.pop() if len(notes) == 1 else None
    if isinstance(note, Rest) and note in resting and note.layout == face.layout():
        return note
    return None


def lay_to_rest(face: Face) -> Rest | None:
    """Hide what a mapping shows until somebody reads it; ``None`` if anything is in use.

    To be called under the lock of its books. See :meth:`Held.lay_to_rest`.
    """
    if face.cache is None or face.cache.traced:
        return None  # compiled code has what it reads
    rest = Rest(face.layout())
    return rest if all(held.lay_to_rest(rest) for held in face.held()) else None


def is_still(rest: Rest, entries: Iterable[Held]) -> bool:
    """Whether nobody was given anything since it was laid to rest."""
    return all(held.rest is rest for held in entries)
