"""Tensors on their way from files to accelerators.

A tensor is read piece by piece into memory that the device copies from by itself: while one
piece is copied, on a stream beside the computation, the next one is read. What is needed next
comes while this is computed with.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import xxhash

from diskoffload.store.digests import Checking
from diskoffload.store.stored import ShardTensor
from diskoffload.system.accelerators import Event, Lane

PIECE_BYTES = 16 << 20
_PIECES = 3


@dataclass
class Loaded:
    """A value on a device, or on its way there.

    Attributes:
        value: the tensor; to be used after the event.
        digest: of its bytes.
        event: when its last piece is there; ``None`` for one without bytes.
    """

    value: torch.Tensor
    digest: bytes
    event: Event | None


class Load(threading.Thread):
    """One tensor that is loaded ahead."""

    def __init__(self, way: DeviceWay, stored: ShardTensor) -> None:
        super().__init__(name="diskoffload-device", daemon=True)
        self.stored = stored
        self._way = way
        self._loaded: Loaded | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Load it; an error is for whoever asks for the result."""
        try:
            self._loaded = self._way.load(self.stored)
        except BaseException as error:
            self._error = error

    def result(self) -> Loaded:
        """Wait for it; raises as :meth:`DeviceWay.load` does."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert self._loaded is not None  # it ran, and raised nothing
        return self._loaded


class DeviceWay:
    """One device's lane and the pieces of memory that lead to it; one load at a time."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._lock = threading.Lock()
        self._pieces: list[tuple[torch.Tensor, Event | None]] = []

    def load(self, stored: ShardTensor) -> Loaded:
        """Begin to load a tensor; its last piece may be on its way still.

        Raises:
            DamagedFileError: its bytes are not those that were written.
            StorageError: it cannot be read.
        """
        spec = stored.spec
        digest, event = xxhash.xxh3_128(), None
        with self._lock, torch.inference_mode(False):
            target = self.lane.empty(spec.nbytes)
            for start in range(0, spec.nbytes, PIECE_BYTES):
                piece = self._free_piece()
                part = piece[: min(PIECE_BYTES, spec.nbytes - start)]
                view = part.numpy().data.cast("B")
                stored.shard.read_into(spec, view, start)
                digest.update(view)
                event = self.lane.copy(part, target[start : start + len(part)])
                self._pieces.append((piece, event))
        check = Checking(str(stored.shard.path), spec.name, spec.offset, stored.digest)
        check.compare(digest.hexdigest())
        value = target.view(stored.dtype).view(stored.shape)
        return Loaded(value, digest.digest(), event)

    def _free_piece(self) -> torch.Tensor:
        if len(self._pieces) < _PIECES:
            return self.lane.staging(PIECE_BYTES)
        piece, event = self._pieces.pop(0)
        if event is not None:
            event.synchronize()
        return piece
