"""What one thread uses again for many chunks: buffers, a compressor, a decompressor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Workspace:
    """Memory and tools of one thread. Not thread-safe; goes with its last reference.

    A buffer grows to the largest size that was asked for, so it is bounded by the largest
    chunk: taking fresh memory for every chunk costs more than decoding into it (measured).
    """

    def __init__(self) -> None:
        self._buffers: dict[object, Bytes] = {}
        self._tools: dict[str, Any] = {}

    def buffer(self, use: object, nbytes: int) -> Bytes:
        """Give a buffer with anything in it; the same one at the next call for this use."""
        found = self._buffers.get(use)
        if found is None or len(found) < nbytes:
            found = self._buffers[use] = np.empty(nbytes, np.uint8)
        return found[:nbytes]

    def tool(self, name: str, make: Callable[[], Any]) -> Any:
        """Give what ``make`` made at the first call for this name."""
        if name not in self._tools:
            self._tools[name] = make()
        return self._tools[name]
