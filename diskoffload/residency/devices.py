"""Loaded copies on accelerators: what they may take there, and what comes before it is needed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from itertools import islice

import torch

from diskoffload.residency.foresight import Foresight
from diskoffload.residency.held import Held, State
from diskoffload.store.device_way import DeviceWay, Load
from diskoffload.store.stored import ShardTensor
from diskoffload.system.accelerators import Accelerators

# Of what a device has left, the share that stays for activations.
_RESERVE_SHARE = 0.1
# What comes ahead: the next entries, as long as they are a small share of what is left.
_AHEAD_SHARE = 4
_MOST_AHEAD = 2
_SOON = 16


class Devices:
    """The accelerators that one residency onloads to. Guarded by the residency's lock."""

    def __init__(self, accelerators: Accelerators, foresight: Foresight) -> None:
        self._accelerators = accelerators
        self._foresight = foresight
        self._ways: dict[torch.device, DeviceWay | None] = {}
        self._ahead: weakref.WeakKeyDictionary[Held, tuple[torch.device, Load]]
        self._ahead = weakref.WeakKeyDictionary()
        self._any = False
        self._pid = os.getpid()

    def is_one(self, device: torch.device) -> bool:
        """Whether a device is an accelerator."""
        found = self._accelerators.is_one(device)
        self._any = self._any or found
        return found

    def is_on(self, held: Held, device: torch.device) -> bool:
        """Whether an entry's copy is on that device; all that is on none is in RAM."""
        place = held.place
        if place is None or not self.is_one(place):
            return not self.is_one(device)
        return place == device

    def loaded_bytes(self, loaded: Mapping[Held, int]) -> int:
        """Tell how many bytes of the copies are on accelerators."""
        if not self._any:  # nobody onloads to one: this is asked several times a read
            return 0
        on_one = [n for held, n in loaded.items() if held.place and self.is_one(held.place)]
        return sum(on_one)

    def can(self, device: torch.device) -> bool:
        """Whether a device can be copied to beside its computation."""
        return self._way(device) is not None

    def room(self, device: torch.device, nbytes: int, loaded: Mapping[Held, int]) -> int:
        """Tell how many bytes must leave a device before so many more fit; 0 or less if none."""
        available_bytes = self._accelerators.available_bytes(device)
        if available_bytes is None:
            return 0
        ours_bytes = sum(n for held, n in loaded.items() if self.is_on(held, device))
        reserve_bytes = int((available_bytes + ours_bytes) * _RESERVE_SHARE)
        return nbytes + reserve_bytes - available_bytes

    def take(
        self, held: Held, stored: ShardTensor, device: torch.device
    ) -> tuple[torch.Tensor, State, bytes]:
        """Give an entry's value on a device, loaded ahead or now, and what :meth:`lay` needs.

        Raises:
            DamagedFileError: its bytes are not those that were written.
            StorageError: it cannot be read.
        """
        way = self._way(device)
        assert way is not None  # it was asked
        at, load = self._ahead.pop(held, (None, None))
        if load is not None and at == device and load.stored is stored:
            loaded = load.result()
        else:
            loaded = way.load(stored)
        if loaded.event is not None:
            way.lane.hand_over(loaded.value, loaded.event)
        return loaded.value, State.LOADED, loaded.digest

    def look_ahead(self, device: torch.device, loaded: Mapping[Held, int]) -> None:
        """Begin to load what a device needs next, if there is much room."""
        way = self._way(device)
        if way is None:
            return
        soon = list(islice(self._foresight.expected(), _SOON))
        for held in list(self._ahead):
            if held not in soon:  # it was expected in vain
                del self._ahead[held]
        running = sum(at == device for at, _ in self._ahead.values())
        for held in soon:
            if running >= _MOST_AHEAD:
                return
            stored = held.backing.plain_stored if held.backing is not None else None
            bound = any(binding.device == device for binding in held.bindings)
            if stored is None or not bound or held.state is not State.VACANT:
                continue
            if held in self._ahead:
                continue
            if self.room(device, stored.spec.nbytes * _AHEAD_SHARE, loaded) > 0:
                return
            load = Load(way, stored)
            self._ahead[held] = device, load
            load.start()
            running += 1

    def quiesce(self) -> None:
        """Wait until nothing is being loaded ahead."""
        for _, load in self._ahead.values():
            load.join()

    def _way(self, device: torch.device) -> DeviceWay | None:
        if self._pid != os.getpid():  # what was begun is the parent's
            self._ways, self._pid = {}, os.getpid()
            self._ahead = weakref.WeakKeyDictionary()
        if device not in self._ways:
            lane = self._accelerators.lane(device)
            self._ways[device] = None if lane is None else DeviceWay(lane)
        return self._ways[device]
