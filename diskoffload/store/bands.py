"""Tensors that are looked at once, from first to last, a band of each after the other.

They are read past the page cache into a few buffers that are used again, the next ones while this
one is worked on. To map them instead costs a first touch of memory that was free until then, and
work of the kernel to take it and give it back: quantizing took 1.4 times as long (measured on a
virtual machine whose host takes free memory back). What somebody has in the page cache already is
looked at there, and stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol, TypeVar

import torch

from diskoffload.store.buffers import Buffers, buffer_size_bytes
from diskoffload.store.fills import Fill, Filling
from diskoffload.store.pieces import pieces_of
from diskoffload.store.stored import ShardTensor

# Smaller ones are mapped: a read of its own, and a buffer, costs each more than it gains.
_LEAST_BYTES = 256 << 10
# So many are begun at most; of small ones each is a range that the kernel is asked for.
_MOST_AHEAD = 256

_Item = TypeVar("_Item")


class Band(Protocol):
    """A tensor on its way into memory."""

    def value(self) -> torch.Tensor:
        """Wait for it, and give it.

        It is only read, and nothing may refer to it any more when the next band is asked for: its
        memory is used again.

        Raises:
            DamagedFileError: the file was changed since it was opened.
            StorageError: it cannot be read, or there is no memory for it.
        """


class _InCache:
    """A band that aliases the page cache."""

    def __init__(self, stored: ShardTensor) -> None:
        self._stored = stored

    def value(self) -> torch.Tensor:
        """Give it; its bytes are there, or read as they are touched."""
        mapped = self._stored.mapped()
        return self._stored.load() if mapped is None else mapped

    def end(self) -> None:
        """Give nothing back."""


class _PastCache:
    """A band in a buffer of its own."""

    def __init__(self, fill: Fill) -> None:
        self._fill: Fill | None = fill

    def value(self) -> torch.Tensor:
        """Wait for it, and give it."""
        assert self._fill is not None  # the next was asked for
        return self._fill.value()

    def end(self) -> Fill | None:
        """Give what it was read into; whoever has this band keeps no memory with it."""
        fill, self._fill = self._fill, None
        return fill


def through(
    items: Sequence[_Item],
    bands_of: Callable[[_Item], Sequence[ShardTensor]],
    most_bytes: int,
) -> Iterator[tuple[_Item, Iterator[Band]]]:
    """Give items one after the other, each with its bands, while those that follow are read.

    Args:
        items: in the order in which they are worked on.
        bands_of: cuts one into bands; asked twice.
        most_bytes: what all buffers may take, the one that is looked at included; a band that is
            larger takes what it needs.

    Yields:
        An item, and its bands, each valid until the next is asked for, and all of them until the
        next item is.

    Raises:
        StorageError: a file cannot be looked at.
        DamagedFileError: it was changed since it was opened.
    """
    coming = chain.from_iterable(map(bands_of, items))
    reader = _Reader(coming, most_bytes)
    try:
        for item in items:
            bands = reader.take(len(bands_of(item)))
            yield item, bands
            for _ in bands:  # whatever was not looked at
                pass
    finally:
        reader.end()


class _Reader:
    """Reads bands ahead, in their order. For one thread."""

    def __init__(self, coming: Iterable[ShardTensor], most_bytes: int) -> None:
        self._coming = iter(coming)
        self._most_bytes = most_bytes
        self._filling, self._buffers = Filling(), Buffers()
        self._next: tuple[ShardTensor, int] | None = None
        self._begun: deque[_InCache | _PastCache] = deque()
        self._used_bytes = 0

    def take(self, count: int) -> Iterator[Band]:
        """Give the next bands."""
        for _ in range(count):
            self._begin_more()
            band = self._begun.popleft()
            yield band
            fill = band.end()
            if fill is not None:
                self._used_bytes -= fill.nbytes
                self._buffers.give(fill.buffer)
            del fill  # the next may need its memory

    def _begin_more(self) -> None:
        while len(self._begun) < _MOST_AHEAD:
            if self._next is None:
                stored = next(self._coming, None)
                if stored is None:
                    return
                self._next = stored, _buffer_bytes(stored)
            if not self._begin(*self._next):
                return
            self._next = None

    def _begin(self, stored: ShardTensor, buffer_bytes: int) -> bool:
        """Begin to read a band; tell whether there was room for it."""
        if not buffer_bytes:
            stored.shard.prefetch(stored.spec, 0, stored.nbytes)
            self._begun.append(_InCache(stored))
            return True
        left_bytes = self._most_bytes - self._used_bytes - buffer_bytes
        if self._used_bytes and left_bytes < 0:
            return False
        self._buffers.shrink(max(0, left_bytes), spare_bytes=buffer_bytes)
        fill = self._filling.begin(stored, self._buffers, stays=False)
        self._used_bytes += fill.nbytes
        self._begun.append(_PastCache(fill))
        return True

    def end(self) -> None:
        """Read no more."""
        self._filling.is_over = True
        self._begun.clear()


def _buffer_bytes(stored: ShardTensor) -> int:
    """Tell how large a buffer a band needs: none if it is small, or is in the page cache."""
    if stored.nbytes < _LEAST_BYTES or stored.shard.is_cached(stored.spec):
        return 0
    return buffer_size_bytes(pieces_of(stored).room_bytes)
