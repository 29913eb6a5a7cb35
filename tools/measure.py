"""What a piece of work took: seconds, bytes read and written, peak anonymous memory.

Measured from within, for this process alone. Off Linux only the seconds are known; the
rest is ``None``. Fields are those of proc(5), ``/proc/pid/io`` and ``/proc/pid/status``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from diskoffload.system.memory import anonymous_bytes_of_process

_SAMPLE_SECONDS = 0.01


@dataclass
class Measurement:
    """What was measured; all but the first two fields are filled in at the end.

    Attributes:
        before_anonymous_bytes: anonymous memory when it began.
        peak_anonymous_bytes: most anonymous memory seen so far, that before included. It is
            sampled every 10 ms, so what comes and goes in between is missed.
        seconds: wall time.
        read_bytes: fetched from the device; what was in the page cache is not counted.
        written_bytes: given to the page cache to be written to the device.
        read_call_bytes: asked for by calls to read and copy; mapped files are not counted.
        written_call_bytes: handed over by calls to write and copy.
    """

    before_anonymous_bytes: int | None = None
    peak_anonymous_bytes: int | None = None
    seconds: float | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    read_call_bytes: int | None = None
    written_call_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Give it as what :func:`json.dumps` takes; the names carry the units."""
        return asdict(self)


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure the body of a ``with`` statement, whether it ends well or not.

    A thread takes samples meanwhile; one that cannot run, because the interpreter is held
    by a long call, takes none.
    """
    before_anonymous_bytes = anonymous_bytes_of_process()
    result = Measurement(before_anonymous_bytes, before_anonymous_bytes)
    before = _counters()
    sampler = _Sampler(result)
    started_seconds = time.monotonic()
    sampler.start()
    try:
        yield result
    finally:
        result.seconds = time.monotonic() - started_seconds
        sampler.stop()
        after = _counters()
        result.read_bytes = _difference(before, after, "read_bytes")
        result.written_bytes = _difference(before, after, "write_bytes")
        result.read_call_bytes = _difference(before, after, "rchar")
        result.written_call_bytes = _difference(before, after, "wchar")


@dataclass
class _Sampler:
    """Raises a measurement's peak while it runs."""

    result: Measurement
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        if self.result.peak_anonymous_bytes is None:
            return
        self._thread = threading.Thread(target=self._run, name="measure", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._take()

    def _run(self) -> None:
        while not self._stopping.wait(_SAMPLE_SECONDS):
            self._take()

    def _take(self) -> None:
        now = anonymous_bytes_of_process() or 0
        self.result.peak_anonymous_bytes = max(self.result.peak_anonymous_bytes or 0, now)


def _counters() -> dict[str, int]:
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return {name: int(value) for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def _difference(before: dict[str, int], after: dict[str, int], name: str) -> int | None:
    return after[name] - before[name] if name in before and name in after else None
