"""What Ctrl-C does to work that can be gone on with."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_interrupt(in_hand: str) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish to stop; a second one interrupts at once.

    Args:
        in_hand: what is ended first, for the message.
    """
    wished: list[bool] = []

    def note(number: int, frame: object) -> None:
        if wished:
            raise KeyboardInterrupt
        wished.append(True)
        print(f"\nstopping after the {in_hand} in hand (again: at once)", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(wished)
    finally:
        signal.signal(signal.SIGINT, before)
