"""Weights that are read past the page cache: which stay, which leave first, what is read next.

A model that is larger than memory and is read over and over defeats the kernel's own cache: what
was read longest ago leaves first, and that is what is needed next. Here as much stays as the
budget allows, spread evenly over a pass, and what is needed next is read while this is computed
with. A buffer is used again only when nothing refers to it any more and its value is known not
to have been edited. Where the kernel tells what was written to, that is asked for as an entry
leaves; elsewhere an entry is hidden from readers, its value is digested by a thread that reads,
and its buffer is taken then, unless somebody read it meanwhile.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from diskoffload.budget import format_bytes
from diskoffload.residency.departures import Departures
from diskoffload.residency.depth import Depth
from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held, State
from diskoffload.store.buffers import Buffers
from diskoffload.store.fills import Check, Fill, Filling
from diskoffload.store.pieces import Streamable, pieces_of
from diskoffload.system.write_watch import write_watch

Mode = Literal["auto", "mapped", "streamed"]
"""How weights are held that lie on disk as they are used, on the CPU."""

# Smaller tensors are mapped in any mode: a page or some of the cache, and no read of their own.
_LEAST_BYTES = 256 << 10
# What is read ahead, at most: a share of the budget, for that much less stays. Where others must
# leave for it no more than keeps a device busy while one entry is computed with, which counts too
# if it came so.
_AHEAD_SHARE = 4
_MOST_AHEAD_BYTES = 512 << 20
_IN_PLACE_BYTES = 36 << 20
# Where nothing can be begun now, it is tried again after so many reads.
_REST_READS = 4
# Of many on their way such a part is taken before it is looked for more, which costs more than a
# small one takes to be read.
_LOOK_SHARE = 4
# With no more than so many it is looked as soon as there may be room for another.
_FEW_FILLS = 8
_NO_BOUND = 1 << 60
# How many entries stay readable without asking: a layer's forward reads its own ones again.
_SHOWN = 4
# Mapped as long as the weights fit this share of what is available, streamed until they fit the
# smaller one again: else a model that just fits would change back and forth.
_FITS_SHARE = 0.9
_FITS_AGAIN_SHARE = 0.7
_DECIDE_EVERY_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Leaving(Protocol):
    """How an entry's memory is taken."""

    def begin_release(self, held: Held) -> int:
        """Hide an entry and begin to look for edits; give its bytes, 0 if it cannot leave.

        One that need not be looked at so leaves at once, and is vacant then.
        """

    def released_bytes(self, held: Held) -> int:
        """Take an entry's memory if nothing uses it; give how much that was."""


class Streaming:
    """Decides and does it, for one residency. Guarded by the residency's lock.

    Attributes:
        mode: what was asked for.
        is_on: whether weights are streamed now.
        buffers: memory to be used again.
        least_bytes: smaller tensors are mapped in any mode.
    """

    def __init__(self, mode: Mode, foresight: Foresight) -> None:
        self.mode: Mode = mode
        self._foresight = foresight
        self.least_bytes = _LEAST_BYTES
        self.is_on = mode == "streamed"
        self.buffers = Buffers()
        self._has_begun = False
        self._filling = Filling()
        over = weakref.finalize(self, setattr, self._filling, "is_over", True)
        over.atexit = False  # who reads a weight as the interpreter ends is to have it
        self._fills: weakref.WeakKeyDictionary[Held, Fill] = weakref.WeakKeyDictionary()
        self._ahead_bytes = 0  # they are many where the entries are small: not summed at each read
        self._shown: deque[weakref.ref[Held]] = deque()
        self._leaving: deque[weakref.ref[Held]] = deque()
        self._departures = Departures(foresight)
        self._awaited: Fill | None = None
        self._passing_bytes = 0  # of what was read last, if it came in for that: it soon leaves
        self._rest_reads = 0
        self._enough_fills = _NO_BOUND
        self._depth = Depth()
        self._was_expected = True
        self._decide_again_at = 0.0
        self._pid = os.getpid()

    @property
    def ahead_bytes(self) -> int:
        """Bytes of what is read ahead; of an entry that is gone, too, until the next look."""
        return self._ahead_bytes

    def decide(self, available_bytes: Callable[[], int], bound_by: Callable[[], str]) -> None:
        """Choose between mapping and streaming, if that is ours to choose; say what and why."""
        now_seconds = time.monotonic()
        if self.mode != "auto" or now_seconds < self._decide_again_at:
            return
        self._decide_again_at = now_seconds + _DECIDE_EVERY_SECONDS
        wanted_bytes = sum(
            one.nbytes for one in map(self._stored_of, self._foresight.entries()) if one
        )
        if not wanted_bytes:
            return
        room_bytes = available_bytes()
        share = _FITS_AGAIN_SHARE if self.is_on else _FITS_SHARE
        wanted = wanted_bytes > room_bytes * share
        if wanted != self.is_on:
            self.is_on = wanted
            _log.info(
                "weights of %s are %s from now on: %s is available (%s)",
                format_bytes(wanted_bytes),
                "streamed past the page cache" if wanted else "mapped",
                format_bytes(room_bytes),
                bound_by(),
            )

    def to_stream(self, held: Held) -> Streamable | None:
        """Give what an entry is to be streamed from; ``None`` if it is to be held otherwise."""
        return self._stored_of(held) if self.is_on else None

    def _stored_of(self, held: Held) -> Streamable | None:
        backing = held.backing
        stored = None if backing is None else backing.streamable
        return stored if stored is not None and stored.nbytes >= self.least_bytes else None

    # ------------------------------------------------------------------ reading

    def note_read(self, held: Held) -> None:
        """Note that an entry was asked for, and hide from readers what was shown before it."""
        self._was_expected = self._foresight.read(held)
        self._passing_bytes = 0
        self._departures.note_read()
        self._rest_reads -= 1
        key = weakref.ref(held)
        if key in self._shown:
            self._shown.remove(key)
        self._shown.append(key)
        while len(self._shown) > _SHOWN:
            before = self._shown.popleft()()
            if before is not None and before.state is State.LOADED:
                before.unpublish()

    def take(
        self, held: Held, stored: Streamable, meanwhile: Callable[[], None]
    ) -> tuple[torch.Tensor, Fill]:
        """Give an entry's value in a buffer, read ahead or now.

        Args:
            held: the entry.
            stored: what it is streamed from.
            meanwhile: called while it is waited for, whenever there may be more to read ahead.

        Raises:
            DamagedFileError: its bytes are not those that were written.
            StorageError: it cannot be read, or there is no memory for it.
        """
        self._check_process()
        self._rest_reads = 0
        fill = self._fills.get(held)
        if fill is None or fill.stored is not stored:
            self._enough_fills = _NO_BOUND  # others are read now than were expected
            fill = self._begin(held, stored)  # it is counted while it is waited for
        else:
            self._depth.note_taken()
        self._awaited = fill
        self._passing_bytes = fill.nbytes
        try:
            while not fill.has_ended:
                meanwhile()
                fill.wait_or_wake()
        finally:
            self._awaited = None
            if self._fills.pop(held, None) is fill:
                self._ahead_bytes -= fill.nbytes
        return fill.value(), fill

    def _begin(self, held: Held, stored: Streamable) -> Fill:
        if not self._has_begun:
            self._has_begun = True
            self.buffers.watch = watch = write_watch()
            how = "by digests" if watch is None else "by asking the kernel what was written to"
            _log.info("edits of streamed weights are found %s", how)
        fill = self._filling.begin(stored, self.buffers)
        before = self._fills.get(held)
        self._fills[held] = fill
        self._ahead_bytes += fill.nbytes - (before.nbytes if before is not None else 0)
        return fill

    def wake(self) -> None:
        """Have who waits for an entry look whether more can be read ahead. Needs no lock."""
        fill = self._awaited
        if fill is not None:
            fill.wake()

    def is_ahead(self, held: Held, stored: Streamable) -> bool:
        """Whether an entry is being read ahead, into memory that is counted already."""
        fill = self._fills.get(held)
        return fill is not None and fill.stored is stored

    @property
    def may_look_ahead(self) -> bool:
        """Whether :meth:`look_ahead` may find more to do than when it was called last."""
        return self._rest_reads <= 0

    def check(self, data: memoryview, when_known: Callable[[], None]) -> Check:
        """Digest bytes that nobody uses, beside whoever computes; see :class:`Filling`."""
        return self._filling.check(data, when_known)

    def look_ahead(self, budget_bytes: int, used_bytes: int, leaving: Leaving) -> None:
        """Begin to read what is needed next, in the place of what should leave.

        Args:
            budget_bytes: what all of it may take.
            used_bytes: what the loaded entries and those read ahead take now.
            leaving: takes an entry's memory.
        """
        self._check_process()
        if len(self._fills) > self._enough_fills:
            return
        self._enough_fills = _NO_BOUND
        self._ahead_bytes = sum(fill.nbytes for fill in self._fills.values())
        most_ahead = self._depth.entries(was_expected=self._was_expected)
        ahead_bytes = ahead = looked_at = 0
        for held in self._foresight.expected():
            looked_at += 1
            if held in self._fills:
                ahead_bytes += self._fills[held].nbytes
                ahead += 1
                continue
            stored = self.to_stream(held)
            if stored is None or held.state is not State.VACANT:
                continue
            nbytes = pieces_of(stored).room_bytes
            in_place = used_bytes + nbytes > budget_bytes
            most_bytes = max(_IN_PLACE_BYTES, nbytes) if in_place else _MOST_AHEAD_BYTES
            if ahead >= most_ahead:
                # It changes with each read. Where next to none was taken it is tried now and then.
                self._rest_reads = 0 if most_ahead else _REST_READS
                return
            if ahead_bytes + nbytes > min(budget_bytes // _AHEAD_SHARE, most_bytes):
                # Nothing changes before one of them is taken.
                self._rest_reads = looked_at if ahead_bytes else _REST_READS
                self._rest_until_taken(ahead)
                return
            if (
                in_place
                and 0 < ahead <= _FEW_FILLS
                and ahead_bytes + self._passing_bytes + nbytes > most_bytes
            ):
                # The device is busy, and in a moment there is the place of what is used now: in
                # that of another, which could stay, one more would be read in each pass.
                self._rest_reads = 0
                return
            while used_bytes + nbytes > budget_bytes:
                freed_bytes = self._freed_bytes(leaving)
                if not freed_bytes and len(self._fills) > ahead:
                    freed_bytes = self._given_up_bytes(held)
                if not freed_bytes:
                    freed_bytes = self._begin_to_leave(held, stored.nbytes, leaving)
                if not freed_bytes:
                    self._rest_reads = 0 if self._leaving else _REST_READS
                    if ahead > _FEW_FILLS:
                        self._rest_until_taken(ahead)
                    return
                used_bytes -= freed_bytes
            self.buffers.shrink(budget_bytes - used_bytes - nbytes, spare_bytes=nbytes)
            fill = self._begin(held, stored)
            used_bytes += fill.nbytes
            ahead_bytes += fill.nbytes
            ahead += 1
        self._rest_reads = looked_at // 2
        self._rest_until_taken(ahead)

    def _rest_until_taken(self, ahead: int) -> None:
        """Look no more until some are taken of so many that are expected, and on their way.

        Others may be on their way, which are not expected any more: they are not counted on.
        """
        self._enough_fills = len(self._fills) - 1 - ahead // _LOOK_SHARE

    def ahead(self) -> list[Held]:
        """List the entries that are read ahead and could be given up."""
        return [held for held, fill in self._fills.items() if self._may_give_up(fill)]

    def give_up(self, held: Held) -> int:
        """Give up what was read ahead of an entry; give its bytes, 0 if it is none of those."""
        fill = self._fills.get(held)
        if fill is None or not self._may_give_up(fill):
            return 0
        del self._fills[held]
        self._ahead_bytes -= fill.nbytes
        self._depth.note_given_up()
        return fill.nbytes

    def _may_give_up(self, fill: Fill) -> bool:
        # The one that is waited for may have ended this moment.
        return fill.has_ended and fill is not self._awaited

    def _given_up_bytes(self, coming: Held) -> int:
        """Give up what was read ahead and is needed later than another: the order has changed."""
        late = [one for one in self.ahead() if not self._foresight.is_needed_before(one, coming)]
        return sum(map(self.give_up, late))

    def _freed_bytes(self, leaving: Leaving) -> int:
        """Take the memory of one entry that is known to have no edits; 0 if there is none."""
        for _ in range(len(self._leaving)):
            ref = self._leaving.popleft()
            held = ref()
            if held is None or held.check is None:
                continue  # it was read again
            if not held.check.digest:
                self._leaving.append(ref)
                continue
            freed_bytes = leaving.released_bytes(held)
            if freed_bytes:
                return freed_bytes
        return 0

    def _begin_to_leave(self, coming: Held, wanted_bytes: int, leaving: Leaving) -> int:
        """Have others leave as soon as they were looked at for edits, which takes a moment.

        Give the bytes of those that left at once.
        """
        freed_bytes = 0
        for ref in self._leaving:
            held = ref()
            if held is not None and held.check is not None:
                wanted_bytes -= held.nbytes
        for held in self._departures.next_ones(self._loaded, _may_leave):
            if wanted_bytes <= 0:
                break
            if self._foresight.is_needed_before(held, coming):
                continue
            nbytes = leaving.begin_release(held)
            wanted_bytes -= nbytes
            if held.check is None:
                freed_bytes += nbytes
            elif nbytes:
                self._leaving.append(weakref.ref(held))
        return freed_bytes

    def _loaded(self) -> list[Held]:
        return [one for one in self._foresight.entries() if one.state is State.LOADED]

    def drop_ahead(self) -> None:
        """Give up what was read ahead; it is read again when it is needed."""
        for fill in self._fills.values():
            fill.is_abandoned = True
        self._forget_fills()

    def _forget_fills(self) -> None:
        self._fills.clear()
        self._ahead_bytes, self._enough_fills = 0, _NO_BOUND

    def quiesce(self) -> None:
        """Wait until nothing is read: a direct read during a fork may go to the child."""
        for fill in self._fills.values():
            fill.wait()

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # the threads that read ahead are the parent's
            self._forget_fills()
            for held in filter(None, (ref() for ref in self._leaving)):
                held.wake()
            self._leaving.clear()
            self.buffers, self._has_begun = Buffers(), False  # their memory is watched there
            self._pid = os.getpid()


def _may_leave(held: Held) -> bool:
    return held.state is State.LOADED and held.check is None
