"""A writer on a bench: what it was given and what it has written."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from shard_files import same

from diskoffload.store.header import FILLER_PREFIX
from diskoffload.store.shard import Shard
from diskoffload.store.writer import Ticket, Writer, digest_of
from diskoffload.system.files import Files

KIB = 1 << 10
MIB = 1 << 20


class Bench:
    """A writer and what it has written."""

    def __init__(self, folder: Path, group_bytes: int = MIB, files: Files | None = None) -> None:
        self.folder = folder
        self.shards: list[Shard] = []
        self._numbers = itertools.count()
        self.writer = Writer(files or Files(), self._next_path, self.shards.append, group_bytes)

    def _next_path(self) -> Path:
        return self.folder / f"{next(self._numbers):04d}.safetensors"

    def put(self, tensor: torch.Tensor, codec: str | None = None, name: str = "x") -> Ticket:
        return self.writer.put(name, tensor, codec)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def tensor_count(self) -> int:
        """Count the tensors in all files, fillers left out."""
        keys = itertools.chain.from_iterable(shard.header.specs for shard in self.shards)
        return sum(not key.startswith(FILLER_PREFIX) for key in keys)


def check_stored(ticket: Ticket, wanted: torch.Tensor) -> None:
    assert ticket.stored is not None
    assert ticket.tensor is None
    loaded = ticket.stored.load()
    assert same(loaded, wanted)
    assert (ticket.stored.dtype, ticket.stored.shape) == (wanted.dtype, tuple(wanted.shape))
    assert ticket.digest == digest_of(loaded) == digest_of(wanted)
