"""Mapped weights: fetched into the page cache ahead of their use, dropped from it behind.

The kernel reads little ahead on a mapping, and where the weights do not fit it drops those that
are needed next. So what is expected next is asked for early, and what is needed last leaves as
soon as more was read than there is room for. Only hints: whatever the kernel does, the values
are right.
"""

from __future__ import annotations

import weakref
from contextlib import suppress

from diskoffload.errors import OffloadError
from diskoffload.residency.departures import Departures
from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held, State
from diskoffload.residency.present import Present
from diskoffload.store.read_ahead import ReadAhead
from diskoffload.store.stored import ShardTensor
from diskoffload.system.memory import can_discard, discard_written

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
# So many reads of something else, and what was asked for is not coming.
_MOST_MISSES = 16


class Mapped:
    """Keeps the page cache ahead of the reader. Guarded by the residency's lock."""

    def __init__(self, foresight: Foresight) -> None:
        self._foresight = foresight
        self._read_ahead = ReadAhead()
        over = weakref.finalize(self, setattr, self._read_ahead, "is_over", True)
        over.atexit = False
        self._asked: weakref.WeakKeyDictionary[Held, int] = weakref.WeakKeyDictionary()
        self._asked_bytes = 0
        self._misses = 0
        self._present = Present()
        self._departures = Departures(foresight)

    def note_read(self, held: Held, room_bytes: int) -> None:
        """Note that a mapped entry was asked for; ask for others, and let some go.

        Args:
            held: the entry; what it lies on may be read by now, or not.
            room_bytes: what is available, clean pages of the page cache included.
        """
        stored = _stored_of(held)
        if stored is None:
            return
        self._foresight.read(held)
        self._departures.note_read()
        self._note(held)
        self._present.add(held, stored)
        free_bytes = min(_LEAST_FREE_BYTES, room_bytes // _LEAST_FREE_SHARE)
        free_bytes = max(free_bytes, room_bytes // _FREE_SHARE)
        ahead_bytes = int(free_bytes * _OF_FREE_AHEAD)
        wanted = self._wanted(min(_MOST_AHEAD_BYTES, ahead_bytes), room_bytes // _MOST_SHARE)
        most_bytes = room_bytes - free_bytes - max(0, self._asked_bytes - ahead_bytes)
        if self._present.nbytes > most_bytes:
            self._drop_behind(held, most_bytes)
        if wanted:
            self._read_ahead.begin(wanted)

    def _note(self, held: Held) -> None:
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
            stored = _stored_of(held)
            if stored is None or held.state not in (State.VACANT, State.BENEATH):
                continue
            nbytes = stored.nbytes
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
        there = self._present

        def may_leave(held: Held) -> bool:
            return held is not now and held in there

        for victim in self._departures.next_ones(lambda: there, may_leave):
            self._give_back(victim)
            if there.nbytes <= most_bytes:
                return

    def _give_back(self, held: Held) -> None:
        """Give the kernel an entry's clean pages, unless something uses it or it was edited."""
        held.unpublish()  # readers ask from now on: it may be one that is to be looked at for edits
        span = held.mapped_span()
        if span is not None and held.is_unheld() and not held.is_changed():
            discard_written(span[0], span[1] - span[0])
        elif held.state is State.BENEATH:
            return
        left = self._present.remove(held)
        if left is not None:
            shard, start, stop = left
            with suppress(OffloadError):  # the kernel will see for itself
                shard.drop_behind(start, stop)


def _stored_of(held: Held) -> ShardTensor | None:
    """Give what an entry is mapped from, if that is large enough to be looked after."""
    stored = held.backing.plain_stored if held.backing is not None else None
    return stored if stored is not None and stored.nbytes >= _LEAST_BYTES else None
