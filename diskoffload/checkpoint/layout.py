"""How a checkpoint's tensors are divided into files. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from diskoffload.checkpoint.source import INDEX_NAME, SINGLE_NAME
from diskoffload.store.header import Planned

WEIGHTS_STEM = "model"


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint and what goes into each.

    Attributes:
        files: by file name, its tensors in order.
        size_bytes: of all tensors.
    """

    files: dict[str, list[Planned]]
    size_bytes: int

    def index_json(self) -> str | None:
        """Give the text of the index, or ``None`` for a single file."""
        if len(self.files) == 1:
            return None
        weight_map = {planned[0]: file for file, items in self.files.items() for planned in items}
        index = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def index_name(self) -> str:
        """Name of the index file."""
        return INDEX_NAME


def lay_out(tensors: Iterable[Planned], max_shard_bytes: int) -> Layout:
    """Divide tensors into files of at most ``max_shard_bytes``, in their order.

    A tensor that is larger has a file of its own.
    """
    groups: list[list[Planned]] = [[]]
    filled = total = 0
    for planned in tensors:
        nbytes = prod(planned[2]) * planned[1].itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(planned)
        filled += nbytes
        total += nbytes
    if len(groups) == 1:
        return Layout({SINGLE_NAME: groups[0]}, total)
    count = len(groups)
    names = [f"{WEIGHTS_STEM}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return Layout(dict(zip(names, groups, strict=True)), total)
