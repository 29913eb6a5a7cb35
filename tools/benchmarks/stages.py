"""Where the time of a cold sweep goes: the least that it does, and one thing more at a time.

Each arm is a loop that does no more than its name says, so that the difference between two of
them is what the thing costs here. The last ones are the library itself.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from diskoffload.system.memory import Memory, anonymous

from . import gauges, host_memory, raw_device, ways
from .arms import Arm
from .checkpoints import Checkpoint, Spec, made, there
from .figure import Figure, Panel, Place, Plan, bars
from .results import Results, Sample

_SPECS = {"tiny": Spec(4, 64), "short": Spec(64, 2048), "full": Spec(64, 4096)}
_ROUNDS = {"tiny": 1, "short": 5, "full": 7}
_PAGE_BYTES = mmap.PAGESIZE
_READERS, _AHEAD = 2, 4
READ = "read into memory that is used again"
FRESH = "read into fresh memory"
DIGESTED = "and digested by the readers"
COMPUTED = "and computed with"
# What each does beyond reading: takes fresh memory, digests, computes.
_STAGES = {
    READ: (False, False, False),
    FRESH: (True, False, False),
    DIGESTED: (True, True, False),
    COMPUTED: (True, True, True),
}

# ---------------------------------------------------------------------- in the child


def measure(label: str, folder: str, scratch: str) -> list[Sample]:
    """Go through a checkpoint's tensors once, in order. (An arm's work.)"""
    del scratch
    checkpoint = there(folder)
    is_fresh, is_digested, is_computed = _STAGES[label]
    side = checkpoint.spec.side
    value = torch.randn(1, side)
    torch.nn.functional.linear(value, torch.randn(side, side))  # torch starts its threads
    host_memory.settle(checkpoint.spec.size_bytes)
    most_bytes = side * side * 4 + 2 * _PAGE_BYTES
    spare = [] if is_fresh else [_touched(most_bytes) for _ in range(_AHEAD + 1)]

    def read(fd: int, offset: int, nbytes: int, memory: Memory) -> torch.Tensor:
        begin = offset % _PAGE_BYTES
        length = -(-(begin + nbytes) // _PAGE_BYTES) * _PAGE_BYTES
        if os.preadv(fd, [memory.view(0, length)], offset - begin) < begin + nbytes:
            raise OSError(f"the file ended before offset {offset + nbytes}")
        if is_digested:
            xxhash.xxh3_128_digest(memory.view(begin, nbytes))
        return memory.tensor(torch.float32, (side, side), begin)

    used_seconds, started = gauges.cpu_seconds(), time.perf_counter()
    under_way: deque[tuple[Future[torch.Tensor], Memory]] = deque()
    kept: list[torch.Tensor] = []
    with ThreadPoolExecutor(_READERS) as readers, torch.no_grad():
        for place in [*_places(checkpoint), *[None] * _AHEAD]:
            if place is None or len(under_way) == _AHEAD:
                future, memory = under_way.popleft()
                weight = future.result()
                if is_computed:
                    value = torch.nn.functional.linear(value, weight)
                if is_fresh:
                    kept.append(weight)
                else:
                    spare.append(memory)
            if place is not None:
                memory = spare.pop() if spare else anonymous(most_bytes)
                under_way.append((readers.submit(read, *place, memory), memory))
    seconds = time.perf_counter() - started
    return [
        Sample("bytes_per_second", checkpoint.spec.size_bytes / seconds),
        Sample("seconds", seconds),
        Sample("cpu_seconds", gauges.cpu_seconds() - used_seconds),
    ]


def _touched(nbytes: int) -> Memory:
    memory = anonymous(nbytes)
    memory.tensor(torch.uint8, (nbytes,)).fill_(1)
    return memory


def _places(checkpoint: Checkpoint) -> Iterator[tuple[int, int, int]]:
    """Give descriptor, offset and length of each tensor, in the model's order."""
    headers: dict[Path, tuple[int, int, dict[str, dict[str, list[int]]]]] = {}
    for path in checkpoint.files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fd, _ = raw_device.open_direct(path, os.O_RDONLY)  # the process ends soon
            headers[path] = fd, 8 + length, json.loads(file.read(length))
    file_of = checkpoint.file_of()
    for name, _ in checkpoint.spec.shapes():
        fd, data_offset, header = headers[file_of[name]]
        start, stop = header[name]["data_offsets"]
        yield fd, data_offset + start, stop - start


# ---------------------------------------------------------------------- the figure


def _plan(place: Place) -> Plan:
    checkpoint = made(place.work_dir, _SPECS[place.scale])
    cold = [] if place.scale == "tiny" else checkpoint.files
    folder = str(checkpoint.folder)
    paths = [str(path) for path in checkpoint.files]
    arms = [
        Arm(raw_device.READ_LABEL, "raw_device:read", {"paths": paths}, cold=cold),
        *(
            Arm(label, "stages:measure", {"label": label, "folder": folder}, cold=cold)
            for label in _STAGES
        ),
        *(
            Arm(
                label,
                "sweep:measure" if cold else "sweep:measure_warm",
                {"label": label, "folder": folder},
                needs=ways.NEEDS.get(label, ()),
                cold=cold,
            )
            for label in (ways.OURS_STREAMED, ways.OURS, ways.CT_DISK)
        ),
    ]
    note = (
        "Each line does what the one before does and one thing more, by two threads that read "
        f"whole tensors, {_AHEAD} on their way; then the library and a peer on the same files."
    )
    return Plan(arms, _ROUNDS[place.scale], [note])


def _panels(results: Results) -> list[Panel]:
    return [
        Panel("Time of a cold sweep", "seconds", bars(results, "seconds", None)),
        Panel("Processor time", "cpu_seconds", bars(results, "cpu_seconds", None)),
    ]


FIGURE = Figure(
    "stages",
    "Where the time of a cold sweep goes",
    {"bytes_per_second": "speed", "seconds": "time", "cpu_seconds": "processor time"},
    str,
    _plan,
    lambda results: [],
    _panels,
)
