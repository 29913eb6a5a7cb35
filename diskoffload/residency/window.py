"""Mapped entries that were read lately, and those that are to be looked at again.

A mapped tensor that is edited in place costs memory of the process's own, page by page, and
nothing tells. So no more than a window's bytes of mapped tensors are readable without asking.
What has left the window is looked at once the process has grown, and written if it was edited.
Reading it again costs some microseconds once.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator

from diskoffload.residency.held import Held
from diskoffload.system.memory import own_bytes_of_process

# So much may be edited, or be taken by anything else, before what has left is looked at.
_GROWTH_BYTES = 32 << 20


class Window:
    """Entries in the order they were read. Guarded by the residency's lock."""

    def __init__(self) -> None:
        self._inside: OrderedDict[weakref.ref[Held], int] = OrderedDict()
        self._left: OrderedDict[weakref.ref[Held], None] = OrderedDict()
        self._inside_bytes = 0
        self._least_bytes = 0

    def __len__(self) -> int:
        """Tell how many there are, those to be looked at included."""
        return len(self._inside) + len(self._left)

    def enter(self, held: Held) -> None:
        """Note that an entry was read just now."""
        key = weakref.ref(held)
        self._left.pop(key, None)
        before = self._inside.pop(key, 0)
        self._inside[key] = nbytes = held.nbytes
        self._inside_bytes += nbytes - before

    def shrink(self, limit_bytes: int, most: int) -> None:
        """Hide from readers what was read longest ago, until the rest fits; never the last.

        Args:
            limit_bytes: what may stay readable.
            most: how many at a time, so that each read costs little.
        """
        for _ in range(most):
            if self._inside_bytes <= limit_bytes or len(self._inside) < 2:
                return
            key, nbytes = self._inside.popitem(last=False)
            self._inside_bytes -= nbytes
            held = key()
            if held is not None:
                held.unpublish()
                self._left[key] = None

    def to_look_at(self, most: int) -> Iterator[Held]:
        """Give entries that have left, if the process has grown since all were looked at."""
        if not self._left:
            return
        own_bytes = own_bytes_of_process()
        self._least_bytes = min(self._least_bytes or own_bytes, own_bytes)
        if own_bytes and own_bytes - self._least_bytes < _GROWTH_BYTES:
            return
        # The latest first: what has grown was most likely edited a moment ago. Who has been
        # looked at cannot be edited until it is read again.
        for _ in range(min(most, len(self._left))):
            key, _nothing = self._left.popitem(last=True)
            held = key()
            if held is not None:
                yield held
        if not self._left:
            self._least_bytes = own_bytes
