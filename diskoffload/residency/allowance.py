"""How much memory copies may take: what the user allows, and what the machine has left."""

from __future__ import annotations

import time

from diskoffload.system.headroom import Headroom

# Room left to the rest of the process: the smaller of these.
_RESERVE_BYTES = 512 << 20
_RESERVE_SHARE = 0.1
# What is available is not all for us where nobody has said how much we may take of it.
_UNASKED_SHARE = 0.5
# What was given up is taken again only where so much more is free, or where more stayed free for
# so long: else each of two processes would give up, and take, what the other does.
_LEAST_GROWTH_BYTES = 64 << 20
_GROWTH_SHARE = 0.1
_STEADY_SECONDS = 0.5
# A container's limit is changed seldom, and costs as much to ask for as what is left of it.
_LIMIT_FOR_SECONDS = 1.0


class Allowance:
    """Follows what is available: less at once, more only where it is much. Not thread-safe.

    Attributes:
        max_bytes: the most there is ever to be; ``None`` where nobody said.
    """

    def __init__(self, max_bytes: int | None, headroom: Headroom) -> None:
        self.max_bytes = max_bytes
        self._headroom = headroom
        self._granted_bytes: int | None = None
        self._more: tuple[float, int] | None = None  # since when, and how much at least
        self._measured_at_seconds = -1.0
        self._ours_then_bytes = 0
        self._limit_bytes = 0
        self._ask_limit_at_seconds = 0.0

    def room_bytes(self, ours_bytes: int) -> int:
        """Tell what is available, or would be if we gave back what we have.

        What we took or gave back since that was measured changes nothing in it.
        """
        available_bytes = self._headroom.available_bytes()
        measured_at_seconds = self._headroom.measured_at_seconds
        if measured_at_seconds != self._measured_at_seconds:
            self._measured_at_seconds, self._ours_then_bytes = measured_at_seconds, ours_bytes
        return self._ours_then_bytes + available_bytes

    def free_bytes(self) -> int:
        """Tell what is available."""
        return self._headroom.available_bytes()

    def reserve_bytes(self) -> int:
        """Tell how much of it is the rest of the process's."""
        now_seconds = time.monotonic()
        if now_seconds >= self._ask_limit_at_seconds:
            self._limit_bytes = self._headroom.limit_bytes()
            self._ask_limit_at_seconds = now_seconds + _LIMIT_FOR_SECONDS
        return min(_RESERVE_BYTES, int(self._limit_bytes * _RESERVE_SHARE))

    def budget_bytes(self, ours_bytes: int, *, asked: bool) -> int:
        """Tell how much may be taken now.

        Args:
            ours_bytes: what is taken already.
            asked: whether all of it was asked for by whoever reads tensors; else, where
                ``max_bytes`` does not say how much, a share is left to others.
        """
        free_bytes = self.room_bytes(ours_bytes) - self.reserve_bytes()
        free_bytes = self._granted_bytes = self._growing(free_bytes)
        if self.max_bytes is not None:
            free_bytes = min(free_bytes, self.max_bytes)
        elif not asked:
            free_bytes = int(free_bytes * _UNASKED_SHARE)
        return max(0, free_bytes)

    def _growing(self, free_bytes: int) -> int:
        """Tell how much of what is free is granted after what was granted before."""
        granted_bytes, more, self._more = self._granted_bytes, self._more, None
        if granted_bytes is None or free_bytes <= granted_bytes:
            return free_bytes
        if free_bytes >= granted_bytes + max(
            _LEAST_GROWTH_BYTES, int(granted_bytes * _GROWTH_SHARE)
        ):
            return free_bytes
        now_seconds = time.monotonic()
        since_seconds, least_bytes = more or (now_seconds, free_bytes)
        least_bytes = min(least_bytes, free_bytes)
        if now_seconds - since_seconds >= _STEADY_SECONDS:
            return least_bytes
        self._more = since_seconds, least_bytes
        return granted_bytes

    def explain(self) -> str:
        """Name what bounds it: ``"machine"``, or a container."""
        return self._headroom.explain()
