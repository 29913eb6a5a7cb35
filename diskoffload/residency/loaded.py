"""The entries of which a copy is in memory, and how much that is."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, MutableMapping

from diskoffload.residency.held import Held


class Loaded(MutableMapping[Held, int]):
    """Bytes of each copy, in the order in which they came; keeps no entry alive.

    Guarded by the residency's lock, but for the end of an entry, which may come in any thread.
    The sum is kept: it is asked for several times a read, whatever the number of entries.
    """

    def __init__(self) -> None:
        self._sizes: dict[weakref.ref[Held], int] = {}
        self._bytes = 0
        self._gone: deque[weakref.ref[Held]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        self._settle()
        return self._bytes

    def _settle(self) -> None:
        while self._gone:
            self._bytes -= self._sizes.pop(self._gone.popleft(), 0)

    def __setitem__(self, held: Held, nbytes: int) -> None:
        self._settle()
        self._bytes -= self._sizes.get(weakref.ref(held), 0)
        self._sizes[weakref.ref(held, self._gone.append)] = nbytes
        self._bytes += nbytes

    def __getitem__(self, held: Held) -> int:
        return self._sizes[weakref.ref(held)]

    def __delitem__(self, held: Held) -> None:
        self._bytes -= self._sizes.pop(weakref.ref(held))

    def __iter__(self) -> Iterator[Held]:
        self._settle()
        for ref in list(self._sizes):
            held = ref()
            if held is not None:
                yield held

    def __len__(self) -> int:
        self._settle()
        return len(self._sizes)
