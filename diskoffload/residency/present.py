"""Mapped entries that are taken to be in the page cache, and how much of it they fill."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

from diskoffload.residency.held import Held
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import HUGE_PAGE_BYTES


class _Place(NamedTuple):
    """Where in a file an entry lay when it was read; that may have changed meanwhile."""

    shard: weakref.ref[Shard]
    start: int
    stop: int

    @property
    def pages(self) -> tuple[int, int]:
        """The huge pages in which it begins and ends."""
        return self.start // HUGE_PAGE_BYTES, (
            max(self.stop, self.start + 1) - 1
        ) // HUGE_PAGE_BYTES


class Present:
    """A set of entries that keeps none alive. Guarded by the residency's lock.

    Files are read in huge pages. The two in which a tensor begins and ends are its neighbours' as
    well: each counts once, for as long as one of them is here.
    """

    def __init__(self) -> None:
        self._places: weakref.WeakKeyDictionary[Held, _Place] = weakref.WeakKeyDictionary()
        self._on_edges: weakref.WeakKeyDictionary[Shard, dict[int, weakref.WeakSet[Held]]]
        self._on_edges = weakref.WeakKeyDictionary()
        self._nbytes = self._count = 0

    def __contains__(self, held: Held) -> bool:
        return held in self._places

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._places))

    @property
    def nbytes(self) -> int:
        """Bytes that all of them fill."""
        if len(self._places) != self._count:  # some are gone
            self._count = len(self._places)
            edges = (others for there in self._on_edges.values() for others in there.values())
            self._nbytes = sum(map(_inner_bytes, self._places.values()))
            self._nbytes += HUGE_PAGE_BYTES * sum(1 for others in edges if others)
        return self._nbytes

    def add(self, held: Held, stored: ShardTensor) -> None:
        """Note that an entry's tensor in a file is read now."""
        if held in self._places:
            return
        spec = stored.spec
        place = _Place(weakref.ref(stored.shard), spec.offset, spec.offset + spec.nbytes)
        self._places[held] = place
        self._nbytes += _inner_bytes(place)
        self._count += 1
        for _, others in self._edges(place):
            self._nbytes += 0 if others else HUGE_PAGE_BYTES
            others.add(held)

    def remove(self, held: Held) -> tuple[Shard, int, int] | None:
        """Note that an entry leaves; tell which bytes of which file leave with it.

        Those are the tensor's, and the rest of huge pages on which nobody else is. ``None`` if the
        file is gone.
        """
        place = self._places.pop(held)
        start, stop = place.start, place.stop
        self._nbytes -= _inner_bytes(place)
        self._count -= 1
        for page, others in self._edges(place):
            others.discard(held)
            if not others:
                self._nbytes -= HUGE_PAGE_BYTES
                start = min(start, page * HUGE_PAGE_BYTES)
                stop = max(stop, (page + 1) * HUGE_PAGE_BYTES)
        shard = place.shard()
        if shard is None:
            self._count = -1  # what was noted of its edges is gone with it: to be counted anew
            return None
        return shard, start, stop

    def _edges(self, place: _Place) -> list[tuple[int, weakref.WeakSet[Held]]]:
        shard = place.shard()
        if shard is None:
            return []
        there = self._on_edges.setdefault(shard, {})
        return [(page, there.setdefault(page, weakref.WeakSet())) for page in set(place.pages)]


def _inner_bytes(place: _Place) -> int:
    """Tell how many bytes of huge pages are one entry's alone."""
    first, last = place.pages
    return max(0, last - first - 1) * HUGE_PAGE_BYTES
