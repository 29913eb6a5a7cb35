"""Weights that are read past the page cache: which stay, which leave first, what is read next.

A model that is larger than memory and is read over and over defeats the kernel's own cache: what
was read longest ago leaves first, and that is what is needed next. Here as much stays as the
budget allows, what is needed last leaves first, and what is needed next is read while this is
computed with. A buffer is used again only when nothing refers to it any more.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Literal

import torch

from diskoffload.budget import format_bytes
from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held, State
from diskoffload.store.buffers import Buffers
from diskoffload.store.fills import Fill, Filling
from diskoffload.store.pieces import Streamable, pieces_of

Mode = Literal["auto", "mapped", "streamed"]
"""How weights are held that lie on disk as they are used, on the CPU."""

# Smaller tensors are mapped in any mode: a page or some of the cache, and no read of their own.
_LEAST_BYTES = 256 << 10
# What is read ahead, at most: a share of the budget, for that much less stays.
_AHEAD_SHARE = 4
_MOST_AHEAD_BYTES = 512 << 20
# How many entries stay readable without asking: a layer's forward reads its own ones again.
_SHOWN = 4
# Mapped as long as the weights fit this share of what is available, streamed until they fit the
# smaller one again: else a model that just fits would change back and forth.
_FITS_SHARE = 0.9
_FITS_AGAIN_SHARE = 0.7
_DECIDE_EVERY_SECONDS = 1.0

_log = logging.getLogger(__name__)


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
        self._filling = Filling()
        weakref.finalize(self, setattr, self._filling, "is_over", True)
        self._fills: weakref.WeakKeyDictionary[Held, Fill] = weakref.WeakKeyDictionary()
        self._shown: deque[weakref.ref[Held]] = deque()
        self._decide_again_at = 0.0
        self._pid = os.getpid()

    @property
    def ahead_bytes(self) -> int:
        """Bytes of what is read ahead."""
        return sum(fill.nbytes for fill in self._fills.values())

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
        self._foresight.read(held)
        key = weakref.ref(held)
        if key in self._shown:
            self._shown.remove(key)
        self._shown.append(key)
        while len(self._shown) > _SHOWN:
            before = self._shown.popleft()()
            if before is not None and before.state is State.LOADED:
                before.unpublish()

    def take(self, held: Held, stored: Streamable) -> tuple[torch.Tensor, bytes, Fill]:
        """Give an entry's value in a buffer, read ahead or now, and its digest.

        Raises:
            DamagedFileError: its bytes are not those that were written.
            StorageError: it cannot be read, or there is no memory for it.
        """
        self._check_process()
        fill = self._fills.pop(held, None)
        if fill is None or fill.stored is not stored:
            fill = self._filling.begin(stored, self.buffers)
        return (*fill.value(), fill)

    def look_ahead(
        self, budget_bytes: int, used_bytes: int, release: Callable[[Held], int]
    ) -> None:
        """Begin to read what is needed next, in the place of what is needed later.

        Args:
            budget_bytes: what all of it may take.
            used_bytes: what the loaded entries and those read ahead take now.
            release: takes an entry's memory if nothing uses it; gives how much that was.
        """
        ahead_bytes = 0
        most_bytes = min(_MOST_AHEAD_BYTES, budget_bytes // _AHEAD_SHARE)
        victims: list[Held] | None = None
        for held in self._foresight.expected():
            if held in self._fills:
                ahead_bytes += self._fills[held].nbytes
                continue
            stored = self.to_stream(held)
            if stored is None or held.state is not State.VACANT:
                continue
            ahead_bytes += stored.nbytes
            if ahead_bytes > most_bytes:
                return
            while used_bytes + stored.nbytes > budget_bytes:
                if victims is None:
                    loaded = [one for one in self._foresight.entries() if one.state is State.LOADED]
                    victims = self._foresight.latest_needed_first(loaded)
                if not victims or self._foresight.is_needed_before(victims[0], held):
                    return
                used_bytes -= release(victims.pop(0))
            nbytes = pieces_of(stored).room_bytes
            self.buffers.shrink(budget_bytes - used_bytes - nbytes, spare_bytes=nbytes)
            self._fills[held] = fill = self._filling.begin(stored, self.buffers)
            used_bytes += fill.nbytes

    def drop_ahead(self) -> None:
        """Give up what was read ahead; it is read again when it is needed."""
        for fill in self._fills.values():
            fill.is_abandoned = True
        self._fills.clear()

    def quiesce(self) -> None:
        """Wait until nothing is read: a direct read during a fork may go to the child."""
        for fill in self._fills.values():
            fill.wait()

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # the threads that read ahead are the parent's
            self._fills.clear()
            self._pid = os.getpid()
