"""What a fork must wait for: a child would find other threads' locks held for ever."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Locked(Protocol):
    """What has a lock that a child must find free."""

    @property
    def lock(self) -> threading.RLock:
        """The lock."""

    def quiesce(self) -> None:
        """Wait, with the lock, for what must not be under way in a fork."""


def quiesce_at_fork(owner: Locked) -> None:
    """Have every fork wait until no other thread is inside the owner's lock."""
    _owners.add(owner)


def _lock_all() -> None:
    _forking.owners = list(_owners)
    for owner in _forking.owners:
        owner.lock.acquire()
        owner.quiesce()


def _unlock_all() -> None:
    for owner in _forking.owners:
        owner.lock.release()
    _forking.owners = []


_owners: weakref.WeakSet[Locked] = weakref.WeakSet()
_forking = threading.local()  # of the thread that forks, also in the child
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock_all, after_in_parent=_unlock_all, after_in_child=_unlock_all)
