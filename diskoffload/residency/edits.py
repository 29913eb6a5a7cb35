"""Which of many mapped entries were not edited: asked of the kernel for all of them at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from diskoffload.residency.held import Held
from diskoffload.system.memory import PAGE_BYTES, written_pages

# Entries that lie this near each other are asked for in one go: 128 bytes to read.
_GAP_BYTES = 16 * PAGE_BYTES


def unedited(entries: Iterable[Held]) -> set[Held] | None:
    """Find entries that lie on their file and of which no page was written.

    ``None`` where the kernel does not say: then each has to be compared with its file.

    The others may be unedited too: a page at an edge may hold a neighbour's edit. Asking costs
    about a 500th of their bytes to read, where asking for each one would cost two system calls.
    """
    laid = [(held.mapped_span(), held) for held in entries]
    spans = sorted((span, number) for number, (span, _) in enumerate(laid) if span is not None)
    found: set[Held] = set()
    for group in _near_each_other(spans):
        start, stop = group[0][0][0], max(span[1] for span, _ in group)
        runs = written_pages(start, stop - start)
        if runs is None:
            return None
        written = list(runs)
        ends = [end for _, end in written]
        for (first, last), number in group:
            place = bisect_left(ends, first + 1)
            if place == len(written) or written[place][0] >= last:
                found.add(laid[number][1])
    return found


_Span = tuple[tuple[int, int], int]


def _near_each_other(spans: list[_Span]) -> Iterator[list[_Span]]:
    group: list[_Span] = []
    reach = 0
    for one in spans:
        if group and one[0][0] > reach + _GAP_BYTES:
            yield group
            group = []
        group.append(one)
        reach = max(reach, one[0][1]) if len(group) > 1 else one[0][1]
    if group:
        yield group
