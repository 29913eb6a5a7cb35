"""A plan of what runs where and lies where, as a table, as a map and as JSON. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from diskoffload.budget import CPU, DISK, format_bytes

# More rows than this no longer fit a screen beside the lines around them.
_MOST_ROWS = 24


@dataclass(frozen=True)
class Placement:
    """Where one module runs and where it lies until then.

    Attributes:
        name: the module's name in the model.
        onload_device: where its tensors are when it runs.
        offload_device: where they lie otherwise: the same device if they stay there, or
            ``"cpu"`` or ``"disk"``.
        size_bytes: all its tensors, each counted once.
        added_bytes: those of them that no earlier entry has brought to ``offload_device``.
    """

    name: str
    onload_device: str
    offload_device: str
    size_bytes: int
    added_bytes: int


@dataclass(frozen=True)
class Plan:
    """What runs where and lies where; printing it shows a table.

    Attributes:
        entries: one for each module that was given, in that order.
        extra_bytes: room for activations that is left on every device.
        reason: one sentence: what was chosen, and why.
    """

    entries: tuple[Placement, ...]
    extra_bytes: int
    reason: str

    def bytes_by_place(self) -> dict[str, int]:
        """Return the bytes that lie in each place, a tensor counted once in each of them."""
        places: Counter[str] = Counter()
        for entry in self.entries:
            places[entry.offload_device] += entry.added_bytes
        return dict(places)

    def device_map(self) -> dict[str, tuple[str, str]]:
        """Return ``(onload device, offload device)`` by module name, in order."""
        return {entry.name: (entry.onload_device, entry.offload_device) for entry in self.entries}

    def as_json(self) -> dict[str, Any]:
        """Return the plan as objects that :func:`json.dumps` takes; sizes are in bytes."""
        return {
            "reason": self.reason,
            "extra_bytes": self.extra_bytes,
            "bytes_by_place": self.bytes_by_place(),
            "entries": [dict(vars(entry)) for entry in self.entries],
        }

    def __str__(self) -> str:
        groups = [list(group) for _, group in groupby(self.entries, key=_pair)]
        interleaved = len(groups) > _MOST_ROWS
        if interleaved:
            pairs = dict.fromkeys(map(_pair, self.entries))
            groups = [[e for e in self.entries if _pair(e) == pair] for pair in pairs]
        rows = [("onload", "offload", "modules", "size", "names")]
        for group in groups:
            first, last = group[0].name or "(root)", group[-1].name or "(root)"
            names = first if len(group) == 1 else f"{first} .. {last}"
            size = format_bytes(sum(entry.added_bytes for entry in group))
            mark = ", interleaved" if interleaved and len(group) > 1 else ""
            rows.append((*_pair(group[0]), str(len(group)), size, names + mark))
        total = format_bytes(sum(self.bytes_by_place().values()))
        rows.append(("total", "", str(len(self.entries)), total, ""))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  "
            f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]
        room = f"room for activations: {format_bytes(self.extra_bytes)}"
        return "\n".join([*lines, room, self.reason])


def _pair(entry: Placement) -> tuple[str, str]:
    return entry.onload_device, entry.offload_device


def describe_budgets(devices: Mapping[str, int]) -> str:
    """Return ``"cuda:0: 8.00 GiB, cuda:1: 8.00 GiB"``."""
    return ", ".join(f"{name}: {format_bytes(size)}" for name, size in devices.items())


def describe_choice(
    entries: Sequence[Placement], devices: Mapping[str, int], extra_bytes: int
) -> str:
    """Return one sentence that says what was chosen and why."""
    if not entries:
        return "no module holds a tensor, so nothing is placed"
    staying: Counter[str] = Counter()
    offloaded: Counter[str] = Counter()
    for entry in entries:
        lies = staying if entry.onload_device == entry.offload_device else offloaded
        lies[entry.offload_device] += entry.added_bytes
    total = format_bytes(sum(staying.values()) + sum(offloaded.values()))
    room = format_bytes(extra_bytes)
    if not offloaded:
        return (
            f"all {len(entries)} modules ({total}) fit on {' and '.join(staying)} and stay "
            f"there, with {room} left for activations"
        )
    parts = [f"{format_bytes(n)} stays on {device}" for device, n in staying.items()]
    named = {CPU: "in RAM", DISK: "on disk"}
    parts += [f"{format_bytes(n)} lies {named[place]}" for place, n in offloaded.items()]
    onload = next(e.onload_device for e in entries if e.onload_device != e.offload_device)
    return (
        f"{len(entries)} modules ({total}) and {room} for activations exceed the budget "
        f"({describe_budgets(devices)}), so {', '.join(parts)} until {onload} needs it"
    )
