"""Tensors that wait in a device's memory, and the cache that keeps them there."""

from __future__ import annotations

from typing import Any

import torch

from diskoffload.cache.base import OffloadCache
from diskoffload.residency.held import Backing, Held, State
from diskoffload.store.writer import Ticket, digest_of
from diskoffload.system.memory import empty, is_counted


class RamBacking:
    """A value in the memory of a device; on that device an entry's object lies right on it."""

    root = None
    plain_stored = None
    streamable = None

    def __init__(self, memory: torch.Tensor) -> None:
        # An alias: the object itself may be laid on another device's memory.
        self.memory = memory.detach()
        self.is_counted = is_counted(memory)  # now: to view it as an array makes it look foreign
        self.layout = (memory.dtype, tuple(memory.shape))

    def is_on(self, device: torch.device) -> bool:
        """Whether the memory is the device's."""
        mine = self.memory.device
        return mine == device or (mine.type == device.type and device.index is None)

    def view_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Do nothing: there is no root to view."""
        return whole

    def beneath(self, device: torch.device) -> torch.Tensor | None:
        """Give the memory itself on its own device."""
        return self.memory if self.is_on(device) else None

    def load(self, device: torch.device) -> torch.Tensor:
        """Copy to another device."""
        return self.memory.to(device, copy=True)

    def check_open(self, name: str) -> None:
        """Do nothing: memory is never closed."""

    def rewrite(self, name: str, value: torch.Tensor) -> Backing | Ticket:
        """Take a newer value at once: by copying from another device, else by moving there."""
        if self.is_on(value.device):
            return RamBacking(value)
        if self.layout != (value.dtype, tuple(value.shape)):
            return RamBacking(value.to(self.memory.device))
        self.memory.copy_(value)
        return self

    def succeed(self, ticket: Ticket) -> Backing:
        """Stay: no value of ours is ever written."""
        return self

    def apart(self, layout: tuple[torch.dtype, tuple[int, ...]]) -> Backing:
        """Have other memory on the same device."""
        dtype, shape = layout
        return RamBacking(torch.empty(shape, dtype=dtype, device=self.memory.device))

    def twin(self, memo: dict[int, Any], *, gaps: bool) -> Backing | None:
        """Answer ``None``: what is in RAM must be copied."""
        return None

    def forget_edits(self, address: int, nbytes: int) -> None:
        """Do nothing: edits here cost nothing of their own."""

    def holds(self, value: torch.Tensor) -> bool:
        """Compare a value with the memory."""
        return digest_of(self.memory) == digest_of(value)

    def was_edited(self, value: torch.Tensor) -> bool:
        """Answer no: an edit of the memory is an edit of the offloaded value."""
        return False


class RamCache(OffloadCache):
    """Offloads to the memory of a device, the CPU included."""

    __slots__ = ()

    def onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        """Give the tensor on the onload device."""
        if offloaded is None:
            return None
        return self.residency.onload(self._entry(offloaded), self.onload_device)

    def offload(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Give a tensor on the offload device: itself if it is there already, else a copy."""
        return None if tensor is None else self._moved(tensor)

    def update_offload(self, offloaded: torch.Tensor, data: torch.Tensor | None) -> None:
        """Copy ``data`` into the offloaded tensor; ``None`` does nothing."""
        if data is not None:
            self.residency.update(self._entry(offloaded), data, self.onload_device)

    def _place(self) -> torch.device:
        return torch.device(self.offload_device)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._place()
        return tensor if tensor.device == place else tensor.detach().to(place)

    def _back(self, tensor: torch.Tensor) -> tuple[Backing, State, bool]:
        backing = RamBacking(self._moved(tensor))
        return backing, State.BENEATH if backing.is_on(tensor.device) else State.LOADED, False

    def _accepts(self, held: Held) -> bool:
        return isinstance(held.backing, RamBacking) and held.backing.is_on(self._place())

    def _move_in(self, held: Held) -> None:
        tensor = held.tensor
        assert tensor is not None  # it was onloaded
        place = self._place()
        if place.type == "cpu":
            # Own memory, not an alias of a mapped file: this placement is meant to be RAM.
            memory = empty(tensor.dtype, tuple(tensor.shape)).copy_(tensor.detach())
        else:
            memory = tensor.detach().to(place, copy=True)
        held.drop_ticket()
        held.backing = RamBacking(memory)
        if held.backing.is_on(tensor.device):
            held.lay(memory, State.BENEATH)
        else:
            held.lay(tensor, State.LOADED)
            self.residency.adopt(held, write=False)

    def _free(self, held: Held, onload: bool) -> torch.Tensor:
        return self.residency.onload(held, self.onload_device if onload else self._place())
