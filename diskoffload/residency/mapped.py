"""Mapped weights: fetched into the page cache ahead of their use, dropped from it behind.

The kernel reads little ahead on a mapping, and where the weights do not fit it drops those that
are needed next. So what is expected next is asked for early, and what is needed last leaves as
soon as more was read than there is room for. Only hints: whatever the kernel does, the values
are right.
"""

from __future__ import annotations

import weakref
from collections import deque

from diskoffload.errors import OffloadError
from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held, State
from diskoffload.store.read_ahead import ReadAhead
from diskoffload.store.shard import Shard
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import HUGE_PAGE_BYTES, can_discard, discard_written

# Smaller ones the kernel reads well enough with their neighbours.
_LEAST_BYTES = 128 << 10
# What is asked for ahead: enough to keep a device busy while a layer is computed.
_MOST_AHEAD_BYTES = 96 << 20
# Of what is available a share stays free of weights that were read, or somewhat more where that is
# little: for those on their way, two thirds of it, and for the kernel, which else drops others.
_FREE_SHARE = 10
_LEAST_FREE_BYTES, _LEAST_FREE_SHARE = 48 << 20, 5
_OF_FREE_AHEAD = 2 / 3
# A weight that takes more of what is available is not asked for ahead.
_MOST_SHARE = 4
# Who was read last is, as a rule, needed last: looking at these is as good as looking at all.
_CANDIDATES = 32
# So many reads of something else, and what was asked for is not coming.
_MOST_MISSES = 16


class Mapped:
    """Keeps the page cache ahead of the reader. Guarded by the residency's lock."""

    def __init__(self, foresight: Foresight) -> None:
        self._foresight = foresight
        self._read_ahead = ReadAhead()
        self._asked: weakref.WeakKeyDictionary[Held, int] = weakref.WeakKeyDictionary()
        self._asked_bytes = 0
        self._misses = 0
        self._present: weakref.WeakKeyDictionary[Held, int] = weakref.WeakKeyDictionary()
        self._present_bytes = 0
        self._on_pages: weakref.WeakKeyDictionary[Shard, dict[int, weakref.WeakSet[Held]]]
        self._on_pages = weakref.WeakKeyDictionary()
        self._latest: deque[weakref.ref[Held]] = deque(maxlen=_CANDIDATES)

    def note_read(self, held: Held, room_bytes: int) -> None:
        """Note that a mapped entry was asked for; ask for others, and let some go.

        Args:
            held: the entry; what it lies on may be read by now, or not.
            room_bytes: what is available, clean pages of the page cache included.
        """
        nbytes = held.nbytes
        if nbytes < _LEAST_BYTES:
            return
        self._foresight.read(held)
        self._note(held, nbytes)
        free_bytes = min(_LEAST_FREE_BYTES, room_bytes // _LEAST_FREE_SHARE)
        free_bytes = max(free_bytes, room_bytes // _FREE_SHARE)
        ahead_bytes = int(free_bytes * _OF_FREE_AHEAD)
        wanted = self._wanted(min(_MOST_AHEAD_BYTES, ahead_bytes), room_bytes // _MOST_SHARE)
        most_bytes = room_bytes - free_bytes - max(0, self._asked_bytes - ahead_bytes)
        if self._present_bytes > most_bytes:
            self._drop_behind(held, most_bytes)
        self._latest.append(weakref.ref(held))
        if wanted:
            self._read_ahead.begin(wanted)

    def _note(self, held: Held, nbytes: int) -> None:
        asked_bytes = self._asked.pop(held, None)
        if asked_bytes is not None:
            self._asked_bytes -= asked_bytes
            self._misses = 0
        elif self._asked:
            self._misses += 1
            if self._misses > _MOST_MISSES:
                self._read_ahead.forget()
                self._asked.clear()
                self._asked_bytes = self._misses = 0
        if held not in self._present:
            self._present[held] = nbytes
            self._present_bytes += nbytes
            for _, others in self._edges(held):
                others.add(held)

    def _wanted(self, ahead_bytes: int, most_bytes: int) -> list[ShardTensor]:
        """List what is to be asked for now, and note that it is.

        Args:
            ahead_bytes: what may be on its way; one that is larger comes alone.
            most_bytes: one that is larger than this does not come ahead.
        """
        wanted: list[ShardTensor] = []
        if self._asked_bytes > ahead_bytes // 2:
            return wanted
        for held in self._foresight.expected():
            if held in self._asked or held in self._present:
                continue
            stored = held.backing.plain_stored if held.backing is not None else None
            if stored is None or held.state not in (State.VACANT, State.BENEATH):
                continue
            nbytes = stored.spec.nbytes
            if nbytes < _LEAST_BYTES:
                continue
            if nbytes > most_bytes or self._asked_bytes + nbytes > max(ahead_bytes, nbytes):
                break
            self._asked[held] = nbytes
            self._asked_bytes += nbytes
            wanted.append(stored)
        return wanted

    # ------------------------------------------------------------------ leaving

    def _drop_behind(self, now: Held, most_bytes: int) -> None:
        if not can_discard():
            return  # else it would be compared with its file for nothing
        self._present_bytes = sum(self._present.values())  # less those that are gone
        if self._present_bytes <= most_bytes:
            return
        latest = [held for ref in self._latest if (held := ref()) is not None]
        for victim in self._foresight.latest_needed_first(latest):
            if victim is now or victim not in self._present or not self._give_back(victim):
                continue
            self._present_bytes -= self._present.pop(victim)
            if self._present_bytes <= most_bytes:
                return

    def _give_back(self, held: Held) -> bool:
        """Give the kernel an entry's clean pages, unless something uses it or it was edited."""
        stored = held.backing.plain_stored if held.backing is not None else None
        held.unpublish()
        span = held.mapped_span()
        if stored is None or span is None or not held.is_unheld() or held.is_changed():
            return False  # readers ask from now on: it may be one that is to be looked at for edits
        address, end = span
        discard_written(address, end - address)
        # A huge page leaves as a whole, with the last of those that lie on it.
        spec, before, after = stored.spec, 0, 0
        for page, others in self._edges(held):
            others.discard(held)
            if not others:
                before = max(before, spec.offset - page * HUGE_PAGE_BYTES)
                after = max(after, (page + 1) * HUGE_PAGE_BYTES - spec.offset - spec.nbytes)
        try:
            stored.shard.drop_behind(spec, before=before, after=after)
        except OffloadError:
            return False  # the kernel will see for itself
        return True

    def _edges(self, held: Held) -> list[tuple[int, weakref.WeakSet[Held]]]:
        """Give the huge pages of a file in which an entry begins and ends, and who lies on them."""
        stored = held.backing.plain_stored if held.backing is not None else None
        if stored is None:
            return []
        spec = stored.spec
        pages = {spec.offset // HUGE_PAGE_BYTES, (spec.offset + spec.nbytes - 1) // HUGE_PAGE_BYTES}
        there = self._on_pages.setdefault(stored.shard, {})
        return [(page, there.setdefault(page, weakref.WeakSet())) for page in pages]
