"""What the project wants of itself: every number that a figure is held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One sentence that is met or not.

    Attributes:
        key: how figures name it.
        figure: the one that measures it.
        text: what is compared, in plain words.
        relation: ``"<="``, ``"<"`` or ``">="``.
        limit: the number.
        unit: ``"x"`` for ratios, else as metrics end (``"seconds"``, ``"bytes"``, ``"files"``).
    """

    key: str
    figure: str
    text: str
    relation: str
    limit: float
    unit: str = "x"

    def is_met(self, value: float) -> bool:
        """Tell whether a number meets it."""
        if self.relation == "<=":
            return value <= self.limit
        return value < self.limit if self.relation == "<" else value >= self.limit


_CT = "times faster than CT DiskCache"
_LARGER = "larger_than_memory"

_ALL = (
    Target("read", "access", "a warm `.weight`, of a plain module's", "<=", 1.5),
    Target("forward", "access", "a small forward, of a plain module's", "<=", 1.3),
    Target("read-peer", "access", f"a warm `.weight`, {_CT}", ">=", 50.0),
    Target("open-time", "opening", "bound and dispatched", "<", 3.0, "seconds"),
    Target("open-memory", "opening", "memory that takes", "<", 200e6, "bytes"),
    Target("write", "writing", "offloading, of the raw device's speed", ">=", 0.85),
    Target("write-files", "writing", "files for many small tensors", "<=", 2.0, "files"),
    Target("write-peer", "writing", f"many small tensors, {_CT}", ">=", 4.0),
    Target("quantize", "quantizing", "time, of the larger of its I/O and its sums", "<=", 1.5),
    Target("sweep", "sweep", "a cold sweep, of the raw device's speed", ">=", 0.85),
    Target("sweep-cpu", "sweep", "its processor time, of CT DiskCache's", "<=", 1 / 3),
    Target("pass-1.2", _LARGER, f"a pass, {_CT}", ">=", 5.0),
    Target("pass-2", _LARGER, f"a pass, {_CT}", ">=", 2.5),
    Target("pass-4", _LARGER, f"a pass, {_CT}", ">=", 1.8),
    Target("pass-accelerate", _LARGER, "a pass, times faster than accelerate", ">=", 4.0),
    Target("pass-bytes", _LARGER, "bytes read a pass, of what was not kept", "<=", 1.05),
    Target("pass-equal", _LARGER, "share of passes with equal outputs", ">=", 1.0, "share"),
    Target("left-bf16", "compression", "share of its size that is left", "<=", 0.68, "share"),
    Target("left-fp16", "compression", "share of its size that is left", "<=", 0.84, "share"),
    Target("left-fp32", "compression", "share of its size that is left", "<=", 0.84, "share"),
    Target("left-bf16-in-fp32", "compression", "share that is left", "<=", 0.34, "share"),
    Target("unpack-plain", "compression", "decompression, of zstd level 1's speed", ">=", 1.6),
    Target("unpack-zipnn", "compression", "decompression, of zipnn's speed", ">=", 1.6),
    Target("pack-plain", "compression", "compression, of zstd level 1's speed", ">=", 1.3),
    Target("onload-packed", "throttled", "onloading, of its speed uncompressed", ">=", 1.0),
    Target("offload-packed", "throttled", "offloading, of its speed uncompressed", ">=", 1.0),
)

TARGETS = {target.key: target for target in _ALL}
"""By key, in the order of the table."""
