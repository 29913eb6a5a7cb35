"""Progress bars: in bytes or in things, shown only when they are asked for."""

from __future__ import annotations

from tqdm import tqdm


class _Bar(tqdm):  # type: ignore[type-arg]
    # tqdm would start a thread of its own, that outlives the bar, to redraw stalled bars.
    monitor_interval = 0


def byte_bar(total_bytes: int, what: str, *, show: bool) -> tqdm[None]:
    """Make a bar that counts bytes and tells the time left; use it as a context manager."""
    return _Bar(
        total=total_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=not show
    )


def count_bar(total: int, what: str, unit: str, *, show: bool) -> tqdm[None]:
    """Make a bar that counts things; use it as a context manager."""
    return _Bar(total=total, desc=what, unit=unit, disable=not show)
