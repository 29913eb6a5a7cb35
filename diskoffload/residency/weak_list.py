"""A list that keeps nothing in it alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# What is gone is let go of whenever the list has doubled, and not before it has so many.
_LEAST_LOOK = 1024


class WeakList(Generic[T]):
    """References in the order in which they were added; a tenth of a weak dictionary's time.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._refs: list[weakref.ref[T]] = []
        self._look_at = _LEAST_LOOK
        self._looking = threading.Lock()

    def add(self, one: T) -> None:
        """Add one at the end; who is there already may be in it twice for a while."""
        self._refs.append(weakref.ref(one))
        if len(self._refs) >= self._look_at:
            with self._looking:
                # Another thread may add more meanwhile. By identity: what is gone has no hash.
                count = len(self._refs)
                live = {id(it): ref for ref in self._refs[:count] if (it := ref()) is not None}
                self._refs[:count] = live.values()
                self._look_at = 2 * len(live) + _LEAST_LOOK

    def take(self) -> WeakList[T]:
        """Give all that is there, and be empty."""
        taken: WeakList[T] = WeakList()
        taken._refs, self._refs = self._refs, []
        return taken

    def __len__(self) -> int:
        """Count what was added, of which some may be gone."""
        return len(self._refs)

    def __iter__(self) -> Iterator[T]:
        for ref in list(self._refs):
            one = ref()
            if one is not None:
                yield one
