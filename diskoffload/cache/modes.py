"""The two modes, ``disable_offloading`` and ``disable_onloading``.

A mode holds for the thread or asyncio task that entered it, and for no other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from diskoffload.residency.held import Held
from diskoffload.residency.resident import Residency


@dataclass(frozen=True)
class Mode:
    """What this thread or task has asked for.

    Attributes:
        onloading_disabled: reads give the offloaded tensor itself.
        kept: entries fetched so far, with their books; ``None`` while nothing is kept.
        outer: the mode that this one was entered in.
        ended: not empty once it was left; a task that was started in it may outlive it.
    """

    onloading_disabled: bool = False
    kept: dict[Held, Residency] | None = None
    outer: Mode | None = None
    ended: list[None] = field(default_factory=list)


_PLAIN = Mode()
_mode: ContextVar[Mode] = ContextVar("diskoffload_mode", default=_PLAIN)
_counting = threading.Lock()

entered: list[None] = []
"""As long as the number of modes entered anywhere: readers ask for theirs only if not empty."""


def current() -> Mode:
    """Tell the mode of this thread or task."""
    mode = _mode.get()
    while mode.ended and mode.outer is not None:
        mode = mode.outer
    return mode


@contextmanager
def _in_mode(mode: Mode) -> Iterator[None]:
    with _counting:
        entered.append(None)
    token = _mode.set(mode)
    try:
        yield
    finally:
        mode.ended.append(None)
        _mode.reset(token)
        with _counting:
            entered.pop()


@contextmanager
def disable_offloading() -> Iterator[None]:
    """Keep what is fetched until the outermost such context of this thread ends.

    A second fetch of the same tensor is then a hit. What is kept is bounded by the
    memory budget: under pressure it leaves, and is onloaded again at the next read.
    """
    if current().kept is not None:
        yield
        return
    kept: dict[Held, Residency] = {}
    with _in_mode(Mode(current().onloading_disabled, kept, current())):
        try:
            yield
        finally:
            by_books: dict[Residency, list[Held]] = {}
            for held, residency in kept.items():
                by_books.setdefault(residency, []).append(held)
            kept.clear()
            for residency, entries in by_books.items():
                residency.release_kept(entries)


@contextmanager
def disable_onloading() -> Iterator[None]:
    """Read and assign offloaded tensors themselves: on disk, those are meta tensors."""
    with _in_mode(Mode(True, current().kept, current())):
        yield


def keep(held: Held, residency: Residency) -> None:
    """Note a fetched entry in this thread's ``disable_offloading`` context, if there is one."""
    kept = current().kept
    if kept is not None and held not in kept:
        kept[held] = residency
        with residency.lock:
            held.keepers += 1
